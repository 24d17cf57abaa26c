"""Makes chat.json: what apply_chat_template of transformers renders, for models/tests/chat.rs.

Needs transformers 5.23, jinja2 3.1.6, gguf 0.19. Usage: python models/tests/golden/make_chat.py MODELS_FOLDER
The templates of SmolLM2 and Qwen2.5 are those in their GGUF files. The others are written here in the manner of their
families: the same statements, filters and functions, other words.
"""

import datetime
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

here = Path(__file__).parent
models = Path(sys.argv[1])

CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You answer.<|im_end|>
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' -}}
{% endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You may call these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
            {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

# What other templates use: Python's methods, loop controls, values that print.
METHODS = """{%- for message in messages %}
    {%- if message.content is not string %}{% continue %}{% endif %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- if message.role.upper().startswith('SYS') %}
        {{- content.strip().replace('a', 'ä').title() ~ '|' }}
    {%- elif loop.index > 6 %}{% break %}
    {%- else %}
        {{- message.role.capitalize() + ': ' + content.rstrip() + (message.get('name', '')) + '\\n' }}
    {%- endif %}
    {%- for key, value in message | items %}{{ key }}={{ value | length }};{% endfor %}
    {{- message.reasoning_content | default('-') }}
{%- endfor %}
{{ true }} {{ none }} {{ 1.0 }} {{ 7 // 2 }} {{ [1, 'x', none] }} {{ {'a': true} }} {{ missing }} {{ enable_thinking | default('unset') }}
{%- set last = namespace(role='') %}
{%- for message in messages[::-1] %}{% set last.role = last.role + message.role[0] %}{% endfor %}
{{- last.role.endswith('u') }} {{ messages | map(attribute='role') | join(',') }}
"""

TOOLS = [{'type': 'function',
  'function': {'name': 'get_weather',
               'description': 'The weather of a <place> & "more", in °C',
               'parameters': {'type': 'object',
                              'properties': {'place': {'type': 'string', 'description': 'Where, e.g. 東京'},
                                             'days': {'type': 'integer', 'default': 1}},
                              'required': ['place']}}},
 {'type': 'function', 'function': {'name': 'a', 'description': '', 'parameters': {}}}]

CHATS = {'one question': {'messages': [{'role': 'user', 'content': 'Hi'}]},
 'system, question and answer': {'messages': [{'role': 'system', 'content': ' Be brief. '},
                                              {'role': 'user', 'content': "What is 1 < 2 & 'x'?"},
                                              {'role': 'assistant', 'content': 'It\'s "true" 🙂\n'}]},
 'several turns': {'messages': [{'role': 'user', 'content': 'a'},
                                {'role': 'assistant', 'content': '<think>\nhm\n</think>\n\nb'},
                                {'role': 'user', 'content': 'c\n\n'}, {'role': 'assistant', 'content': 'd'},
                                {'role': 'user', 'content': ''}]},
 'tools': {'tools': [{'type': 'function',
                      'function': {'name': 'get_weather',
                                   'description': 'The weather of a <place> & "more", in °C',
                                   'parameters': {'type': 'object',
                                                  'properties': {'place': {'type': 'string',
                                                                           'description': 'Where, e.g. 東京'},
                                                                 'days': {'type': 'integer', 'default': 1}},
                                                  'required': ['place']}}},
                     {'type': 'function', 'function': {'name': 'a', 'description': '', 'parameters': {}}}],
           'messages': [{'role': 'system', 'content': 'Use tools.'}, {'role': 'user', 'content': 'Weather in 東京?'}]},
 'tools without a system message': {'tools': [{'type': 'function',
                                               'function': {'name': 'get_weather',
                                                            'description': 'The weather of a <place> & "more", in °C',
                                                            'parameters': {'type': 'object',
                                                                           'properties': {'place': {'type': 'string',
                                                                                                    'description': 'Where, '
                                                                                                                   'e.g. '
                                                                                                                   '東京'},
                                                                                          'days': {'type': 'integer',
                                                                                                   'default': 1}},
                                                                           'required': ['place']}}},
                                              {'type': 'function',
                                               'function': {'name': 'a', 'description': '', 'parameters': {}}}],
                                    'messages': [{'role': 'user', 'content': 'Weather?'}]},
 'a tool call': {'tools': [{'type': 'function',
                            'function': {'name': 'get_weather',
                                         'description': 'The weather of a <place> & "more", in °C',
                                         'parameters': {'type': 'object',
                                                        'properties': {'place': {'type': 'string',
                                                                                 'description': 'Where, e.g. 東京'},
                                                                       'days': {'type': 'integer', 'default': 1}},
                                                        'required': ['place']}}},
                           {'type': 'function', 'function': {'name': 'a', 'description': '', 'parameters': {}}}],
                 'messages': [{'role': 'user', 'content': 'Weather?'},
                              {'role': 'assistant',
                               'tool_calls': [{'id': 'abcdefgh1',
                                               'type': 'function',
                                               'function': {'name': 'get_weather',
                                                            'arguments': {'place': '東京',
                                                                          'days': 2,
                                                                          'x': [1.5, None, True]}}}]},
                              {'role': 'tool',
                               'tool_call_id': 'abcdefgh1',
                               'name': 'get_weather',
                               'content': '{"degrees": 20}'},
                              {'role': 'assistant', 'content': '20 °C'}]},
 'two tool calls': {'messages': [{'role': 'user', 'content': 'Weather?'},
                                 {'role': 'assistant',
                                  'content': 'I look.',
                                  'tool_calls': [{'id': 'abcdefgh1',
                                                  'type': 'function',
                                                  'function': {'name': 'get_weather', 'arguments': {'place': 'a'}}},
                                                 {'id': 'abcdefgh2',
                                                  'type': 'function',
                                                  'function': {'name': 'a', 'arguments': {}}}]},
                                 {'role': 'tool', 'tool_call_id': 'abcdefgh1', 'content': '1'},
                                 {'role': 'tool', 'tool_call_id': 'abcdefgh2', 'content': '2'},
                                 {'role': 'assistant', 'content': 'done'}]},
 'arguments as text': {'messages': [{'role': 'user', 'content': 'x'},
                                    {'role': 'assistant',
                                     'content': '',
                                     'tool_calls': [{'id': 'abcdefgh1',
                                                     'type': 'function',
                                                     'function': {'name': 'a', 'arguments': '{"b": 1}'}}]}]},
 'no content': {'messages': [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': None}]},
 'reasoning': {'messages': [{'role': 'user', 'content': 'x'},
                            {'role': 'assistant', 'reasoning': 'r', 'content': 'y'}]},
 'two questions': {'messages': [{'role': 'user', 'content': 'x'}, {'role': 'user', 'content': 'y'}]},
 'a variable': {'messages': [{'role': 'user', 'content': 'x'}],
                'variables': {'enable_thinking': False, 'date_string': '1 Jan 2030'}}}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 3, 7, 8, 9, 10)


chat_template_utils.datetime = Clock
tokenizer = {}
for folder in ["smollm2-135m", "qwen2.5-coder-0.5b"]:
    file = next((models / folder).glob("*.gguf"))
    tokenizer[folder] = AutoTokenizer.from_pretrained(models / folder, gguf_file=file.name)
templates = {
    "smollm2": (tokenizer["smollm2-135m"].chat_template, "<|im_start|>", "<|im_end|>"),
    "qwen2.5": (tokenizer["qwen2.5-coder-0.5b"].chat_template, "<|endoftext|>", "<|im_end|>"),
    "chatml": (CHATML, "<s>", "<|im_end|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": (MISTRAL, "<s>", "</s>"),
    "methods": (METHODS, "<s>", "</s>"),
}
any_tokenizer = tokenizer["smollm2-135m"]
out = {"chats": CHATS, "templates": {}}
for name, (template, bos, eos) in templates.items():
    rendered = {}
    for title, chat in CHATS.items():
        for prompt in [False, True]:
            arguments = dict(chat_template=template, tools=chat.get("tools"), tokenize=False)
            arguments |= dict(add_generation_prompt=prompt, bos_token=bos, eos_token=eos, **chat.get("variables", {}))
            try:
                result = {"text": any_tokenizer.apply_chat_template(chat["messages"], **arguments)}
            except Exception as error:
                result = {"error": str(error)}
            rendered.setdefault(title, []).append(result)
    out["templates"][name] = {"template": template, "bos_token": bos, "eos_token": eos, "rendered": rendered}
(here / "chat.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")
