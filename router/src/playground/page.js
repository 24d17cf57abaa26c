// Finds out which kind of model is served and shows what fits: a chat, a classification or a comparison.

const SECTIONS = { "/v1/chat/completions": "chat", "/v1/classify": "classify", "/v1/embeddings": "embed" };
/** Most alternatives to a token. */
const ALTERNATIVES = 5;
/** Most labels that are shown at once. */
const MOST_LABELS = 10;

// Chat

let messages = [];
let running = null;

function chatRequest(conversation) {
  const system = $("system").value.trim();
  const body = { messages: system ? [{ role: "system", content: system }, ...conversation] : conversation };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value) body[name] = $(name).valueAsNumber;
  }
  if ($("probabilities").checked) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

/** Reads an answer into its element as it arrives. What it has read so far is in `answer`, also if it throws. */
async function read(answer, article, conversation) {
  const [text, tokens] = [article.querySelector(".text"), article.querySelector(".tokens")];
  Object.assign(answer, await request("v1/chat/completions", chatRequest(conversation), running.signal));
  for await (const event of events(answer.response)) {
    answer.usage = event.usage ?? answer.usage;
    const choice = event.choices?.[0];
    if (!choice) continue;
    const follows = innerHeight + scrollY > document.documentElement.scrollHeight - 60;
    const [content, entries] = [choice.delta.content ?? "", choice.logprobs?.content ?? []];
    if (content || entries.length) {
      answer.last = performance.now();
      answer.first ??= answer.last;
    }
    answer.text += content;
    if (content) text.append(content);
    tokens.append(...entries.map(token));
    if (entries.length) article.classList.add("has-tokens");
    answer.reason = choice.finish_reason ?? answer.reason;
    if (follows) scrollTo(0, document.documentElement.scrollHeight);
  }
}

function chatFacts({ facts, begin, first, last, usage, reason }) {
  const seconds = first && `${((first - begin) / 1000).toFixed(2)} s`;
  const speed = usage?.completion_tokens > 1 && last > first && ((usage.completion_tokens - 1) / (last - first)) * 1000;
  const count = usage && `${usage.prompt_tokens} + ${usage.completion_tokens}`;
  return [["First token", seconds], ["Tokens/s", speed && speed.toFixed(1)], ["Tokens", count], ["Finish reason", reason], ...facts];
}

async function ask() {
  const question = $("question").value;
  if (!question.trim()) return;
  const article = $("answer-template").content.cloneNode(true).querySelector("article");
  $("turns").append(make("div", "question", question), article);
  $("question").value = "";
  // A new conversation may begin meanwhile.
  const conversation = messages;
  conversation.push({ role: "user", content: question });
  running = new AbortController();
  $("stop").hidden = false;
  article.classList.add("busy");
  article.scrollIntoView({ block: "end" });
  const answer = { text: "", facts: [] };
  let failed = false;
  try {
    await read(answer, article, conversation);
  } catch (error) {
    failed = error.name !== "AbortError";
    answer.reason = failed ? "error" : "stopped";
    if (failed) article.querySelector(".facts").before(showProblem(error));
  }
  running = null;
  $("stop").hidden = true;
  article.classList.remove("busy");
  const first = article.querySelector(".token");
  if (first) first.tabIndex = 0;
  showFacts(article.querySelector(".facts"), chatFacts(answer));
  if (failed || !answer.text) conversation.pop();
  else conversation.push({ role: "assistant", content: answer.text });
  if (failed && !$("question").value) $("question").value = question;
  // An answer that did not end is not recorded.
  if (!failed) offerFeedback(article.querySelector(".feedback"), answer.reason === "stopped" ? "" : answer.id, answer.text);
}

onSubmit($("ask"), ask);
$("stop").addEventListener("click", () => running?.abort());
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
const showProbabilities = () => document.body.classList.toggle("probabilities", $("probabilities").checked);
$("probabilities").addEventListener("change", showProbabilities);
$("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("turns").replaceChildren();
  $("question").focus();
});

// Classification and similarity

/** Sends a request and puts the card that `show` makes of its answer above the earlier ones. */
async function answerAbove(place, path, body, show) {
  const card = make("article", "answer card");
  try {
    const { response, id, begin, facts } = await request(path, body);
    const answer = await response.json();
    const list = make("dl", "facts");
    showFacts(list, [["Time", `${Math.round(performance.now() - begin)} ms`], ["Tokens", answer.usage?.total_tokens], ...facts]);
    card.append(...show(answer, id), list);
  } catch (error) {
    card.append(showProblem(error));
  }
  place.prepend(card);
}

function showLabels(text, { data: [result] }, id) {
  const output = make("output");
  const buttons = [];
  const rows = result.probabilities.toSorted((a, b) => b.score - a.score).map(({ label, score }) => {
    const row = bar(label, score);
    if (!RECORDED.test(id)) return row;
    const button = make("button", "quiet", "Right");
    button.type = "button";
    button.dataset.label = label;
    button.setAttribute("aria-label", `${label} is the right label`);
    buttons.push(button);
    row.append(button);
    return row;
  });
  choose(buttons, output, (button) => ({ request_id: id, expected_label: button.dataset.label }));
  const more = make("details", "", make("summary", "", `${rows.length - MOST_LABELS} more labels`), ...rows.slice(MOST_LABELS));
  more.hidden = rows.length <= MOST_LABELS;
  return [make("p", "quoted", text), ...rows.slice(0, MOST_LABELS), more, buttons.length ? output : unrecorded()];
}

function showCosine({ data }) {
  const [one, two] = data.toSorted((a, b) => a.index - b.index).map(({ embedding }) => embedding);
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  const cosine = dot(one, two) / Math.sqrt(dot(one, one) * dot(two, two));
  const quoted = [$("one").value, $("two").value].map((text) => make("p", "quoted", text));
  return [...quoted, make("p", "cosine", `Cosine ${cosine.toFixed(4)}`), make("p", "note", `${one.length} dimensions`)];
}

onSubmit($("classify-form"), () => {
  const text = $("text").value;
  return answerAbove($("classified"), "v1/classify", { input: [text] }, (answer, id) => showLabels(text, answer, id));
});
onSubmit($("embed-form"), () => {
  const input = [$("one").value, $("two").value];
  return answerAbove($("compared"), "v1/embeddings", { input, encoding_format: "float" }, showCosine);
});

// The page

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") ($("alternatives").hidden ? running?.abort() : hideAlternatives());
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.target.form?.requestSubmit();
});

async function start() {
  $("forget").hidden = !key;
  // A browser keeps what was checked over a reload.
  showProbabilities();
  $("status").textContent = "Loading …";
  try {
    const { data: [model] } = await (await request("v1/models")).response.json();
    const { paths } = await (await request("openapi.json")).response.json();
    const path = Object.keys(SECTIONS).find((path) => path in paths);
    if (!path) throw new Problem({ message: "There is no page for this kind of model." });
    $("access").hidden = true;
    $("status").textContent = "";
    $("model").textContent = `${model.id} · ${path}`;
    document.title = `${model.id} – Playground`;
    $(SECTIONS[path]).hidden = false;
    $("settings").open = matchMedia("(min-width: 800px)").matches;
    $(SECTIONS[path]).querySelector("form textarea").focus();
  } catch (error) {
    const again = make("button", "quiet", "Try again");
    again.addEventListener("click", start);
    $("status").replaceChildren(showProblem(error), ...($("access").hidden ? [again] : []));
  }
}

onSubmit($("access"), () => {
  keep($("key").value.trim());
  $("key").value = "";
  $("access").hidden = true;
  return start();
});
$("forget").addEventListener("click", () => {
  keep("");
  location.reload();
});
start();
