"""The parts of bfcl-eval that bench/tools.py uses: test cases, requests with tools, and the score of an answer.

Cases, ground truth, the conversion of functions to OpenAI's tools, the decoding of answers and the checkers are bfcl-eval's own code. Ours
is the draw of cases and the search for calls in text (`calls_in_text`).
"""

import hashlib, json, os, pathlib, re, sys, types

# bfcl-eval makes folders for results next to itself unless it is given another place; its client refuses to start without a key.
os.environ.setdefault("BFCL_PROJECT_ROOT", os.path.join(os.environ["ATHANOR_CACHE"], "bfcl"))
os.environ.setdefault("OPENAI_API_KEY", "none")
sys.path.insert(0, str(pathlib.Path(os.environ["ATHANOR_DATA"]) / "bfcl-eval-2026.3.23"))

# bfcl-eval's registry of models imports the clients of all vendors. The checker reads one field of an entry: the names of functions have
# "_" where the ground truth has ".", as with all models behind OpenAI's API.
MODEL = "qwen2.5-coder-1.5b"
registry = types.ModuleType("bfcl_eval.constants.model_config")
registry.MODEL_CONFIG_MAPPING = {MODEL: types.SimpleNamespace(underscore_to_dot=True)}
sys.modules[registry.__name__] = registry

from bfcl_eval.constants.enums import Language, ReturnFormat
from bfcl_eval.eval_checker import eval_runner
from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler
from bfcl_eval.model_handler.local_inference.hammer import HammerHandler
from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry
from openai.types.chat import ChatCompletion

CATEGORIES = {"simple": "simple_python", "multiple": "multiple", "parallel": "parallel", "irrelevance": "irrelevance"}
HANDLER = OpenAICompletionsHandler(model_name=MODEL, temperature=0, registry_name=MODEL, is_fc_model=True)


class Case:
    """A test case with its ground truth, which is absent if no function may be called."""

    def __init__(self, category, entry, truth):
        self.category, self.entry, self.truth = category, entry, truth
        self.id = entry["id"]

    def request(self):
        """`messages` and `tools` of the request."""
        data = HANDLER._compile_tools(HANDLER._pre_query_processing_FC({}, self.entry), self.entry)
        data = HANDLER.add_first_turn_message_FC(data, self.entry["question"][0])
        return {"messages": data["message"], "tools": data["tools"]}

    def check(self, calls):
        """bfcl-eval's verdict on a list of `{name: arguments as JSON}`, or on a text: None if right, else what is wrong."""
        common = (HANDLER, self.id, calls)
        if self.truth is None:
            verdict = eval_runner._evaluate_single_relevance_entry(*common, self.entry, MODEL, self.category)
        else:
            verdict = eval_runner._evaluate_single_ast_entry(
                *common, self.truth, self.entry, MODEL, CATEGORIES[self.category], Language.PYTHON, ReturnFormat.PYTHON
            )
        return None if verdict["valid"] else f"{verdict['error_type']}: {' '.join(map(str, verdict['error']))}"


def cases(category, count):
    """The first cases of a category in the order of a hash: a larger draw contains every smaller one."""
    entries = load_dataset_entry(CATEGORIES[category])
    truths = {}
    if category != "irrelevance":
        truths = {truth["id"]: truth["ground_truth"] for truth in load_ground_truth_entry(CATEGORIES[category])}
    drawn = sorted(entries, key=lambda entry: hashlib.sha256(entry["id"].encode()).digest())[:count]
    return [Case(category, entry, truths[entry["id"]] if truths else None) for entry in drawn]


def served_calls(answer):
    """The calls that a server found in an answer, or the text if it found none."""
    return HANDLER._parse_query_response_FC(ChatCompletion.model_validate(answer))["model_responses"]


def objects(text):
    """The JSON objects in a text that consists of objects, or of lists of them, with space, commas or semicolons between."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while match := re.compile(r"[\s,;]*(?=[\[{])").match(text, at):
        try:
            value, at = decoder.raw_decode(text, match.end())
        except json.JSONDecodeError:
            return []
        found += value if isinstance(value, list) else [value]
    return [] if text[at:].strip(" \n\r\t,;") else found


def calls_in_text(text):
    """The calls that a model wrote as JSON in Markdown blocks, in <tool_call> tags or as the whole text, decoded by bfcl-eval's handler of
    Hammer, a model that was made from Qwen2.5-Coder and writes lists of objects with `name` and `arguments`."""
    marked = re.findall(r"```[a-z]*\n(.*?)```|<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    calls = []
    for part in [block or tag for block, tag in marked] or [text]:
        for item in objects(part):
            if isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("arguments"), dict):
                calls += HammerHandler.decode_ast(None, json.dumps([item]), ReturnFormat.PYTHON, False)
    return [{name: json.dumps(arguments)} for call in calls for name, arguments in call.items()]


def all_calls(answer):
    """The calls of an answer wherever they are, or the text if there is none: those that the server found and those in the text."""
    message = answer["choices"][0]["message"]
    served = served_calls(answer) if message.get("tool_calls") else []
    return served + calls_in_text(message.get("content") or "") or message.get("content")
