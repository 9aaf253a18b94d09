"use strict";

const $ = (id) => document.getElementById(id);
let model = null;
let start = null; // the image to start from, an ImageBitmap
let startUrl = null; // its object URL
const cards = new Map(); // of jobs and of images, by id
const POLL = 300; // milliseconds between looks at the jobs
let sending = 0; // requests whose job is not known yet

// control characters and marks that reorder text, of prompts and names, as escapes
function printable(text) {
  const unsafe = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;
  return String(text).replace(unsafe, (found) => `\\u${found.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function announce(text) { $("status").textContent = text; }

// ---------------------------------------------------------------------------------------------- the form

async function setUp() {
  model = await get("/model");
  $("model").textContent = `${printable(model.name)}, ${model.width}×${model.height} pixels`;
  document.title = `${printable(model.name)} · ldm serve`;
  $("prompt").maxLength = $("negative").maxLength = model.limits.prompt;
  if (model.classes?.length) {
    $("prompt").parentElement.firstChild.textContent = "Class ";
    choose("prompt", model.classes.map((name) => new Option(printable(name), name)));
    choose("negative", [new Option("none", ""), ...model.classes.map((name) => new Option(printable(name), name))]);
  } else if (model.classes) { // unconditional
    for (const name of ["prompt", "negative", "guidance"]) $(name).parentElement.hidden = true;
    $("prompt").required = false;
    $("guidance").value = 1; // which costs no second evaluation
  }
  $("steps").max = model.limits.steps;
  recommend(model.recommended);
  for (const side of ["width", "height"]) {
    $(side).min = $(side).step = model.unit;
    $(side).max = Math.floor(model.limits.pixels / model.unit);
    $(side).value = model[side];
  }
  for (const [width, height] of model.sizes) $("size").add(new Option(`${width}×${height}`));
  $("sizes").hidden = model.sizes.length < 2;
  for (const name of model.schedulers) $("scheduler").add(new Option(name, name));
  model.adapters.forEach(offer);
  for (const image of await get("/images")) finish(newCard(image.settings), image);
  $("generate").disabled = false;
  watch();
}

// settings that were found best for this model are the defaults of the form
function recommend(settings) {
  for (const name of ["steps", "guidance"]) if (name in settings) $(name).value = settings[name];
  if (settings.scheduler) $("scheduler").options[0].textContent = `${settings.scheduler} (recommended)`;
  const shown = Object.entries(settings).map(([name, value]) => `${name} ${value}`).join(", ");
  $("recommended").textContent = `Recommended for this model: ${shown}.`;
  $("recommended").hidden = !shown;
}

// an adapter of the server, with the words that call up what it was trained on
function offer(adapter) {
  const row = $("adapter").content.firstElementChild.cloneNode(true);
  row.querySelector(".name").textContent = printable(adapter.name);
  adapter.field = row.querySelector("input");
  adapter.field.value = adapter.weight;
  row.querySelector("p").textContent = `Trigger words: ${printable(adapter.trigger_words.join(", "))}`;
  row.querySelector("p").hidden = !adapter.trigger_words.length;
  $("adapters").append(row);
  $("adapters").hidden = false;
}

// the adapters of settings, such as "sha256:…=0.8"
function adaptersOf(settings) {
  return (settings.lora ?? []).map((each) => {
    const at = each.lastIndexOf("=");
    const [reference, weight] = [each.slice(0, at), each.slice(at + 1)];
    return { reference, weight, name: model.adapters.find((one) => one.reference === reference)?.name ?? reference };
  });
}

// a list in the place of a field
function choose(name, options) {
  const list = document.createElement("select");
  list.id = name;
  list.append(...options);
  $(name).replaceWith(list);
}

async function get(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error((await response.json()).error);
  return response.json();
}

function readForm() {
  if ($("random").checked) $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  const settings = { prompt: $("prompt").value, negative: $("negative").value.trim() };
  for (const name of ["seed", "steps", "guidance", "width", "height"]) settings[name] = Number($(name).value);
  settings.scheduler = $("scheduler").value || null;
  const adapters = model.adapters.filter((one) => Number(one.field.value));
  if (adapters.length) settings.lora = adapters.map((one) => `${one.reference}=${Number(one.field.value)}`);
  if (start) settings.strength = Number($("strength").value);
  return settings;
}

function fillForm(settings) {
  for (const name of ["prompt", "negative", "seed", "steps", "guidance"]) $(name).value = settings[name];
  for (const side of ["width", "height"]) $(side).value = settings[side] ?? model[side];
  $("scheduler").value = settings.scheduler ?? "";
  for (const one of model.adapters) {
    one.field.value = adaptersOf(settings).find((used) => used.reference === one.reference)?.weight ?? 0;
  }
  if (settings.strength !== null) $("strength").value = settings.strength;
  showStrength();
  $("random").checked = false;
}

function showStrength() { $("strength-shown").textContent = Number($("strength").value).toFixed(2); }

async function setStart(blob) {
  if (startUrl) URL.revokeObjectURL(startUrl);
  start = startUrl = null;
  if (blob) {
    try {
      start = await createImageBitmap(blob);
      const clear = hasTransparency(start);
      if (clear) $("strength").value = 1; // what is transparent is generated from nothing
      $("transparent").hidden = !clear;
      showStrength();
      startUrl = URL.createObjectURL(blob);
      $("start-image").src = startUrl;
      $("error").textContent = "";
    } catch {
      $("error").textContent = "This file cannot be read as an image; choose another one.";
    }
  }
  if (!start) $("file").value = "";
  $("start").hidden = !start;
}

function pixelsOf(bitmap) {
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

// what is less than half opaque is generated
function hasTransparency(bitmap) {
  const pixels = pixelsOf(bitmap);
  for (let at = 3; at < pixels.length; at += 4) if (pixels[at] < 128) return true;
  return false;
}

// cropped and resized here, so that a large photo need not be uploaded
function startAsBase64(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const scale = Math.max(width / start.width, height / start.height);
  const [w, h] = [start.width * scale, start.height * scale];
  const [left, top] = [(width - w) / 2, (height - h) / 2];
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(start, left, top, w, h);
  if (!$("transparent").hidden) makeTransparent(context, scale, left, top);
  return canvas.toDataURL("image/png").split(",")[1];
}

// a pixel is transparent where any part of it was, so that thin lines stay
function makeTransparent(context, scale, left, top) {
  const { width, height } = context.canvas;
  const scaled = context.getImageData(0, 0, width, height);
  const pixels = pixelsOf(start);
  let any = false;
  for (let at = 3, pixel = 0; at < pixels.length; at += 4, pixel += 1) {
    if (pixels[at] >= 128) continue;
    const x = Math.floor(((pixel % start.width) + 0.5) * scale + left);
    const y = Math.floor((Math.floor(pixel / start.width) + 0.5) * scale + top);
    if (x < 0 || x >= width || y < 0 || y >= height) continue;
    scaled.data[(y * width + x) * 4 + 3] = 0;
    any = true;
  }
  if (!any) throw new Error("The transparent part is cropped off at this size; choose another one.");
  context.putImageData(scaled, 0, 0);
}

async function blobAsBase64(blob) {
  const reader = new FileReader();
  await new Promise((resolve) => { reader.onload = resolve; reader.readAsDataURL(blob); });
  return reader.result.split(",")[1];
}

// ---------------------------------------------------------------------------------------------- a card

function newCard(settings) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  card.querySelector(".prompt").textContent = printable(settings.prompt);
  card.querySelector(".prompt").hidden = !settings.prompt;
  const shown = {
    negative: settings.negative, seed: settings.seed, steps: settings.steps, guidance: settings.guidance,
    size: `${settings.width ?? model.width}×${settings.height ?? model.height}`, scheduler: settings.scheduler,
    strength: settings.strength,
    adapters: adaptersOf(settings).map((one) => `${one.name} ${one.weight}`).join(", "),
  };
  for (const [name, value] of Object.entries(shown)) {
    if (value === "" || value === null || value === undefined) continue;
    const pair = document.createElement("div");
    pair.append(document.createElement("dt"), document.createElement("dd"));
    pair.firstChild.textContent = name;
    pair.lastChild.textContent = printable(value);
    card.querySelector(".settings").append(pair);
  }
  card.querySelector(".actions").hidden = true;
  $("gallery").prepend(card);
  $("empty").hidden = true;
  return card;
}

function show(card, source) {
  const image = card.querySelector("img");
  image.onload = () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < 160);
  if (image.getAttribute("src") !== source) image.src = source;
}

function finish(card, image) {
  cards.set(image.id, card);
  const address = `/images/${image.id}/image.png`;
  card.querySelector(".waiting").hidden = true;
  card.querySelector(".actions").hidden = false;
  card.querySelector("img").alt = image.settings.prompt || `seed ${image.settings.seed}`;
  card.querySelector(".again").onclick = () => generateAgain(image);
  const download = card.querySelector(".download");
  download.href = address;
  download.download = `${(image.settings.prompt || model.name).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-${image.settings.seed}.png`;
  const from = card.querySelector(".from");
  from.hidden = !image.started;
  from.href = `/images/${image.id}/start.png`;
  show(card, address);
}

function fail(card, error) {
  card.classList.add("failed");
  card.querySelector("progress").hidden = true;
  card.querySelector(".state").textContent = error;
  const button = card.querySelector(".cancel");
  button.textContent = "Close";
  button.onclick = () => {
    if (card.job) forget(card.job);
    card.remove();
    $("empty").hidden = $("gallery").children.length > 0;
  };
  announce(error);
}

// ---------------------------------------------------------------------------------------------- generation

async function generate(settings, base64) {
  const card = newCard(settings);
  card.scrollIntoView({ block: "nearest" }); // on a phone it is below the form
  const abort = new AbortController();
  card.querySelector(".cancel").onclick = () => abort.abort();
  sending += 1;
  try {
    const headers = { "Content-Type": "application/json" };
    const body = JSON.stringify(base64 ? { settings, start: base64 } : { settings });
    const response = await fetch("/generate", { method: "POST", headers, body, signal: abort.signal });
    if (!response.ok) throw new Error((await response.json()).error);
    adopt(card, response.headers.get("Location").split("/").pop());
    response.body.cancel(); // the job continues without this connection
  } catch (error) {
    fail(card, abort.signal.aborted ? "Cancelled." : error instanceof TypeError ? "The server does not answer." : error.message);
  }
  sending -= 1;
}

// a card shows a job of the server
function adopt(card, job) {
  card.job = job;
  cards.set(job, card);
  card.querySelector(".cancel").onclick = () => { forget(job); fail(card, "Cancelled."); };
}

function forget(job) { fetch(`/jobs/${job}`, { method: "DELETE" }).catch(() => {}); }

// the cards follow the jobs of the server, so that those of before a reload, and of other pages, are shown, too
async function watch() {
  for (;;) {
    const before = new Map([...cards].filter(([id, card]) => id === card.job));
    try {
      const jobs = await get("/jobs");
      $("lost").hidden = true;
      for (const job of jobs) {
        update(job);
        before.delete(job.id);
      }
      for (const card of before.values()) if (!isOver(card)) fail(card, "The server has ended this job.");
    } catch { $("lost").hidden = false; }
    await new Promise((resolve) => setTimeout(resolve, $("gallery").querySelector(".waiting:not([hidden])") ? POLL : 5 * POLL));
  }
}

function isOver(card) { return card.classList.contains("failed") || card.querySelector(".waiting").hidden; }

function update(job) {
  let card = cards.get(job.id);
  if (!card) {
    if (sending || (job.image && cards.has(job.image.id))) return;
    card = newCard(job.settings);
    adopt(card, job.id);
  }
  if (isOver(card)) return;
  if (job.state === "done") { finish(card, job.image); announce("The image is finished."); }
  else if (job.state === "failed") fail(card, job.error);
  else progress(card, job);
}

function progress(card, update) {
  const bar = card.querySelector("progress");
  const state = card.querySelector(".state");
  if (update.state === "waiting") {
    state.textContent = update.ahead ? `waiting, ${update.ahead} ahead` : "waiting";
  } else if (update.steps) {
    [bar.max, bar.value] = [update.steps, update.step];
    state.textContent = `step ${update.step} of ${update.steps}`;
  } else {
    state.textContent = "reading the prompt";
  }
  if (update.preview) show(card, update.preview);
}

async function generateAgain(image) {
  let base64 = null;
  let blob = null;
  if (image.started) {
    const response = await fetch(`/images/${image.id}/start.png`);
    if (!response.ok) { $("error").textContent = (await response.json()).error; return; }
    blob = await response.blob();
    base64 = await blobAsBase64(blob); // the original bytes: a canvas may change them
  }
  await setStart(blob);
  fillForm(image.settings);
  $("error").textContent = "";
  // all settings, including those that the form does not show; the server names the start image
  await generate({ ...image.settings, image: null }, base64);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("error").textContent = "";
  const settings = readForm();
  if (settings.width * settings.height > model.limits.pixels) {
    $("error").textContent = `Width times height is at most ${model.limits.pixels} here.`;
    return;
  }
  try {
    generate(settings, start ? startAsBase64(settings.width, settings.height) : null);
  } catch (error) { $("error").textContent = error.message; }
});
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
});
$("file").addEventListener("change", () => setStart($("file").files[0]));
$("no-start").addEventListener("click", () => setStart(null));
$("strength").addEventListener("input", showStrength);
$("size").addEventListener("change", () => { [$("width").value, $("height").value] = $("size").value.split("×"); });
$("generate").disabled = true;
showStrength();
setUp().catch(() => { $("error").textContent = "The server does not answer; reload the page."; });
