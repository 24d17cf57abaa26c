// Elements, requests, feedback and tokens. Texts of models and of errors become text nodes only; nothing parses HTML.

const $ = (id) => document.getElementById(id);
/** The form of request ids to which there can be feedback. */
const RECORDED = /^r-[0-9a-f]{32}-\d+-[0-9a-f]{12}$/;

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const percent = (p) => `${(p * 100).toFixed(1)} %`;
const hex = (bytes) => Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, "0")).join("");

function bar(name, p) {
  const track = make("span", "track");
  track.style.setProperty("--p", p);
  return make("div", "bar", make("span", "", name), track, make("span", "number", percent(p)));
}

function showFacts(list, facts) {
  const shown = facts.filter(([, value]) => value);
  const id = (name) => (name === "Request" || name === "Trace" ? "id" : "");
  list.replaceChildren(...shown.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", id(name), value))));
}

// Requests

const STORED = "athanor-api-key";
let key = "";
// Without storage the key lives as long as the page.
try { key = sessionStorage.getItem(STORED) ?? ""; } catch { /* see above */ }

function keep(value) {
  key = value;
  $("forget").hidden = !value;
  try { value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED); } catch { /* see above */ }
}

class Problem extends Error {
  constructor({ message, code, param } = {}, ...more) {
    super(message ?? "The answer is not one of the API.");
    this.details = [...more, code, param].filter(Boolean).join(" · ");
  }
}

/** Sends a request; throws a Problem with the API's message unless it succeeds. */
async function request(path, body, signal) {
  const trace = hex(16);
  const headers = { traceparent: `00-${trace}-${hex(8)}-01` };
  const revision = $("revision").value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  if (body && revision) headers["x-athanor-revision"] = revision;
  const begin = performance.now();
  const sent = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  const response = await fetch(path, sent);
  const id = response.headers.get("x-request-id") ?? "";
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    if (response.status === 401) {
      $("access").hidden = false;
      $("key").focus();
    }
    throw new Problem(error, `HTTP ${response.status}`, id);
  }
  return { response, id, begin, facts: [["Revision", response.headers.get("x-athanor-revision")], ["Request", id], ["Trace", trace]] };
}

function showProblem(error) {
  const shown = make("p", "problem", error instanceof TypeError ? `No answer: ${error.message}` : error.message);
  if (error.details) shown.append(make("br"), make("small", "", error.details));
  shown.setAttribute("role", "alert");
  return shown;
}

/** The JSON of a stream's server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Problem({ message: "The connection ended before the answer did." });
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Problem(event.error);
      yield event;
    }
  }
}

function onSubmit(form, run) {
  let busy = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy) return;
    busy = form.querySelector("button").disabled = true;
    try { await run(); } finally { busy = form.querySelector("button").disabled = false; }
  });
}

// Feedback

/** Sends feedback and shows its result. Returns whether it was accepted. */
async function judge(output, item) {
  output.replaceChildren(make("span", "note", "Sending …"));
  try {
    const { accepted } = await (await request("v1/feedback", item)).response.json();
    output.replaceChildren(make("span", "good", accepted === 1 ? "Feedback accepted." : `Feedback: ${accepted} accepted.`));
    return true;
  } catch (error) {
    output.replaceChildren(showProblem(error));
    return false;
  }
}

const unrecorded = () => make("p", "note", "This answer is not recorded, so it takes no feedback.");

/** Buttons of which the last one whose feedback was accepted is pressed. */
function choose(buttons, output, itemOf) {
  for (const button of buttons) {
    button.addEventListener("click", async () => {
      if (await judge(output, itemOf(button))) {
        for (const other of buttons) other.setAttribute("aria-pressed", other === button);
      }
    });
  }
}

function offerFeedback(box, id, text) {
  box.hidden = false;
  if (!RECORDED.test(id)) return box.replaceChildren(unrecorded());
  const output = box.querySelector("output");
  choose([...box.querySelectorAll("[data-rating]")], output, (button) => ({ request_id: id, rating: Number(button.dataset.rating) }));
  const corrected = box.querySelector("textarea");
  corrected.value = text;
  onSubmit(box.querySelector("form"), () => judge(output, { request_id: id, expected_text: corrected.value }));
}

// Tokens and their alternatives

const details = new WeakMap();

function token(entry) {
  const shown = make("span", "token", entry.token);
  shown.style.setProperty("--p", Math.exp(entry.logprob));
  shown.tabIndex = -1;
  details.set(shown, entry);
  return shown;
}

function showAlternatives(element) {
  const entry = details.get(element);
  const box = $("alternatives");
  box.hidden = !entry;
  if (!entry) return;
  const all = [entry, ...entry.top_logprobs.filter((other) => other.token !== entry.token)].sort((a, b) => b.logprob - a.logprob);
  box.replaceChildren(...all.map((one) => {
    const shown = bar(JSON.stringify(one.token), Math.exp(one.logprob));
    if (one.token === entry.token) shown.style.fontWeight = "bold";
    return shown;
  }));
  element.setAttribute("aria-describedby", "alternatives");
  const place = element.getBoundingClientRect();
  const below = place.bottom + 6;
  const top = below + box.offsetHeight < innerHeight ? below : place.top - box.offsetHeight - 6;
  box.style.top = `${Math.max(top, 0)}px`;
  box.style.left = `${Math.max(Math.min(place.left, document.documentElement.clientWidth - box.offsetWidth - 8), 8)}px`;
}

const hideAlternatives = () => { $("alternatives").hidden = true; };
for (const name of ["mouseover", "focusin"]) $("turns").addEventListener(name, (event) => showAlternatives(event.target));
for (const name of ["mouseleave", "focusout"]) $("turns").addEventListener(name, hideAlternatives);
for (const name of ["scroll", "resize"]) addEventListener(name, () => showAlternatives(document.activeElement));
// One stop of the tab key for all tokens of an answer.
$("turns").addEventListener("keydown", (event) => {
  const sibling = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
  const next = details.has(event.target) && sibling && event.target[sibling];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
