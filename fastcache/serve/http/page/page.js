import { Easel } from "./easel.js";

const form = document.getElementById("ask");
const status = document.getElementById("status");
const drawButton = document.getElementById("draw");
const cancelButton = document.getElementById("cancel");
const easel = new Easel(form.elements, (text) => say(text, true));
let models = []; // as /v1/models has them
let running = null;

function say(text, failed = false) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
}

function headers() {
  const key = form.elements.key.value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  if (response.status === 401) document.getElementById("key-field").hidden = false;
  const message = body?.error?.message ?? `The server answered ${response.status}.`;
  return Object.assign(new Error(message), { status: response.status });
}

/** The options of a select; what was chosen stays so, where it is still among them. */
function fill(select, options) {
  const before = select.options.length ? select.value : null;
  select.replaceChildren(...options.map(([value, text, enabled = true]) => {
    const option = new Option(text, value);
    option.disabled = !enabled;
    return option;
  }));
  if (options.some(([value, , enabled = true]) => enabled && value === before)) select.value = before;
}

function same(values) {
  return values.map((value) => [value, value]);
}

/** What the server offers: asked for at the start, and again once there is a key. */
async function offers() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await refusal(response);
  models = (await response.json()).data;
  fill(form.elements.model, same(models.map((model) => model.id)));
  document.getElementById("model-field").hidden = models.length < 2;
  show();
  say(`Ready: ${models.map((model) => model.id).join(", ")}.`);
}

/** Ask for the offers, again while the server loads. */
async function begin() {
  try {
    await offers();
  } catch (error) {
    say(error.message, true);
    if (error.status === 503) setTimeout(begin, 1000);
  }
}

function chosen() {
  return models.find((model) => model.id === form.elements.model.value);
}

/** Show what the chosen model can do. */
function show() {
  const fields = form.elements;
  const model = chosen();
  fill(fields.sampler, same(model.samplers));
  fill(fields.size, same(model.sizes));
  const plans = Object.fromEntries(model.qualities.map((offer) => [offer.quality, offer.plan]));
  fill(fields.quality, [
    ...["medium", "high", "low"].map((quality) => [quality, told(quality, plans[quality]), quality in plans]),
    ["", "as under More"],
  ]);
  const { sampler, ...numbers } = model.defaults;
  if (model.samplers.includes(sampler)) fields.sampler.value = sampler;
  for (const [name, value] of Object.entries(numbers)) {
    const field = fields[name];
    if (field.value === field.defaultValue) field.value = value; // else somebody has been quicker
  }
  easel.offered = model.edits;
  easel.resize(...fields.size.value.split("x").map(Number));
  byQuality();
}

function told(quality, plan) {
  if (!plan) return `${quality}: no fitted plans here`;
  const figure = plan.psnr_db === null ? "" : `, ${plan.psnr_db.toFixed(1)} dB`;
  return `${quality}: ${plan.unet_calls} steps, ${plan.full_calls} full${figure}`;
}

/** A quality's plan says its steps itself. */
function byQuality() {
  document.getElementById("numbers").disabled = form.elements.quality.value !== "";
}

/** The events of a stream, as {type, ...} objects. */
async function* events(response) {
  let text = "";
  for await (const chunk of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
    text += chunk;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

class Panel {
  constructor(id) {
    const section = document.getElementById(id);
    this.name = section.querySelector("h2").textContent;
    this.image = section.querySelector("img");
    this.strip = section.querySelector(".strip");
    this.figures = section.querySelector(".figures");
  }

  clear() {
    this.image.hidden = true;
    this.strip.replaceChildren();
    this.strip.setAttribute("aria-label", "No steps yet");
    this.figures.textContent = "";
  }

  step({ step, num_steps: count, kind }) {
    if (!this.strip.children.length) {
      this.strip.append(...Array.from({ length: count }, () => document.createElement("i")));
    }
    this.strip.children[step].className = kind;
    this.strip.children[step].title = `step ${step + 1}: ${kind}`;
    const full = this.strip.querySelectorAll(".full").length;
    this.strip.setAttribute("aria-label", `${step + 1} of ${count} steps, ${full} of them full`);
    this.figures.textContent = `step ${step + 1} of ${count}, ${kind}`;
  }

  show({ b64_json: data }, alt) {
    this.image.src = `data:image/png;base64,${data}`;
    this.image.alt = alt;
    this.image.hidden = false;
  }

  /** Draw one image, following its steps. Returns its time from the first byte sent, in seconds. */
  async draw(asked, signal) {
    this.clear();
    const start = performance.now();
    const body = { ...asked, stream: true, stream_steps: true, partial_images: 8 };
    const response = await fetch(`v1/images/${asked.image ? "edits" : "generations"}`, {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal,
    });
    if (!response.ok) throw await refusal(response);
    let plan = null;
    for await (const event of events(response)) {
      if (event.type === "fastcache.step") this.step(event);
      else if (event.type === "error") throw new Error(event.error.message);
      else {
        const done = event.type.endsWith(".completed");
        if (done) plan = event.plan;
        this.show(event, `${done ? "" : "Unfinished: "}${asked.prompt}`);
      }
    }
    if (!plan) throw new Error("The server ended the answer before the image was done.");
    const seconds = (performance.now() - start) / 1000;
    const far = plan.psnr_db === null ? "" : `; ${plan.psnr_db.toFixed(1)} dB from uncached on calibration`;
    this.figures.textContent =
      `${seconds.toFixed(2)} s; ${this.strip.querySelectorAll(".full").length} full and ` +
      `${this.strip.querySelectorAll(".shallow").length} shallow steps${far}`;
    return seconds;
  }
}

const cached = new Panel("cached");
const uncached = new Panel("uncached");

function remember(asked, text) {
  document.getElementById("nothing").hidden = true;
  const item = document.createElement("li");
  for (const panel of [cached, uncached]) {
    if (panel.image.hidden) continue;
    const image = document.createElement("img");
    image.src = panel.image.src;
    image.alt = `${panel.name}: ${asked.prompt}`;
    item.append(image);
  }
  const line = document.createElement("span");
  const how = asked.quality
    ? `quality ${asked.quality}`
    : `${asked.num_inference_steps} steps of ${asked.sampler}, every ${asked.cache_interval}`;
  const from = asked.image ? `, ${asked.mask ? "under a mask" : "from a picture"}, strength ${asked.strength}` : "";
  line.textContent = `${asked.prompt} (${how}${from}, guidance ${asked.guidance_scale}, seed ${asked.seed}): ${text}`;
  item.append(line);
  document.getElementById("history").prepend(item);
}

function request() {
  const fields = form.elements;
  const asked = { prompt: fields.prompt.value, model: fields.model.value, size: fields.size.value, ...easel.fields };
  if (fields.negative_prompt.value) asked.negative_prompt = fields.negative_prompt.value;
  for (const name of ["guidance_scale", "seed"]) asked[name] = Number(fields[name].value);
  if (fields.quality.value) return { ...asked, quality: fields.quality.value };
  for (const name of ["num_inference_steps", "cache_interval"]) asked[name] = Number(fields[name].value);
  return { ...asked, sampler: fields.sampler.value };
}

/** The same without caching: of a quality the run that its plan was fitted to. */
function plain({ quality, ...asked }) {
  const offer = chosen().qualities.find((one) => one.quality === quality);
  const own = offer ? { num_inference_steps: offer.num_inference_steps, sampler: offer.sampler } : {};
  return { ...asked, ...own, cache_interval: 1 };
}

/** One after the other, so that neither slows the other down. */
async function run(signal) {
  if (!models.length) await offers();
  const asked = request();
  uncached.clear();
  say("Drawing with caching.");
  const seconds = await cached.draw(asked, signal);
  let text = `cached ${seconds.toFixed(2)} s`;
  if (form.elements.beside.checked) {
    say("Drawing without caching.");
    const other = await uncached.draw(plain(asked), signal);
    text += `, uncached ${other.toFixed(2)} s: ${(other / seconds).toFixed(2)} times as fast`;
  }
  remember(asked, text);
  say(`Done: ${text}.`);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  drawButton.disabled = true;
  cancelButton.disabled = false;
  try {
    await run(running.signal);
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else say(error.message, true);
  } finally {
    running = null;
    drawButton.disabled = false;
    cancelButton.disabled = true;
  }
});
cancelButton.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
// A field that does not fit is shown, be it in what is folded up.
form.addEventListener("invalid", (event) => {
  const folded = event.target.closest("details");
  if (folded) folded.open = true;
}, true);
form.elements.model.addEventListener("change", show);
form.elements.quality.addEventListener("change", byQuality);
form.elements.size.addEventListener("change", () => easel.resize(...form.elements.size.value.split("x").map(Number)));
form.elements.key.addEventListener("change", begin);
begin();
