"use strict";

const form = document.getElementById("ask");
const status = document.getElementById("status");
const drawButton = document.getElementById("draw");
const cancelButton = document.getElementById("cancel");
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
  return new Error(body?.error?.message ?? `The server answered ${response.status}.`);
}

function fill(select, values) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
}

/** What the server offers: asked for at the start, and again once there is a key. */
async function offers() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await refusal(response);
  const [model] = (await response.json()).data;
  fill(form.elements.sampler, model.samplers);
  fill(form.elements.size, model.sizes);
  const { sampler, ...numbers } = model.defaults;
  if (model.samplers.includes(sampler)) form.elements.sampler.value = sampler;
  for (const [name, value] of Object.entries(numbers)) {
    const field = form.elements[name];
    if (field.value === field.defaultValue) field.value = value; // else somebody has been quicker
  }
  say(`Ready: ${model.id}.`);
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
    const body = { ...asked, stream: true, stream_steps: true, partial_images: Math.min(8, asked.num_inference_steps - 1) };
    const response = await fetch("v1/images/generations", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal,
    });
    if (!response.ok) throw await refusal(response);
    let done = false;
    for await (const event of events(response)) {
      if (event.type === "fastcache.step") this.step(event);
      else if (event.type === "error") throw new Error(event.error.message);
      else {
        done = event.type === "image_generation.completed";
        this.show(event, `${done ? "" : "Unfinished: "}${asked.prompt}`);
      }
    }
    if (!done) throw new Error("The server ended the answer before the image was done.");
    const seconds = (performance.now() - start) / 1000;
    this.figures.textContent =
      `${seconds.toFixed(2)} s; ${this.strip.querySelectorAll(".full").length} full and ` +
      `${this.strip.querySelectorAll(".shallow").length} shallow steps`;
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
  line.textContent =
    `${asked.prompt} (${asked.num_inference_steps} steps of ${asked.sampler}, every ${asked.cache_interval}, ` +
    `guidance ${asked.guidance_scale}, seed ${asked.seed}): ${text}`;
  item.append(line);
  document.getElementById("history").prepend(item);
}

function request() {
  const fields = form.elements;
  const asked = { prompt: fields.prompt.value, sampler: fields.sampler.value, size: fields.size.value };
  if (fields.negative_prompt.value) asked.negative_prompt = fields.negative_prompt.value;
  for (const name of ["num_inference_steps", "cache_interval", "guidance_scale", "seed"]) {
    asked[name] = Number(fields[name].value);
  }
  return asked;
}

/** One after the other, so that neither slows the other down. */
async function run(signal) {
  if (!form.elements.sampler.options.length) await offers();
  const asked = request();
  uncached.clear();
  say("Drawing with caching.");
  const seconds = await cached.draw(asked, signal);
  let text = `cached ${seconds.toFixed(2)} s`;
  if (form.elements.beside.checked) {
    say("Drawing without caching.");
    const plain = await uncached.draw({ ...asked, cache_interval: 1 }, signal);
    text += `, uncached ${plain.toFixed(2)} s: ${(plain / seconds).toFixed(2)} times as fast`;
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
form.elements.key.addEventListener("change", () => offers().catch((error) => say(error.message, true)));
offers().catch((error) => say(error.message, true));
