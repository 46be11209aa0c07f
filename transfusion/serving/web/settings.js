// The settings of an image: guidance scale, steps, number, size, seed. They start at the run's defaults.
import { at, make } from "./dom.js";

const SLIDERS = ["guidance", "steps", "count", "seed"];
const [guidance, steps, count, seed] = SLIDERS.map(at);
const wide = matchMedia("(min-width: 721px)"); // as in style.css
let codes = null; // for a run whose images are codes: their number by size; such a run has no steps to set

for (const name of SLIDERS) at(name).addEventListener("input", showValues);
seed.addEventListener("input", () => (at("new-seed").checked = false));
wide.addEventListener("change", fold);
fold();

/** The settings as fields of a request. Changes nothing on the page. */
export function readSettings() {
  return {
    guidance_scale: guidance.valueAsNumber,
    ...(codes ? {} : { steps: steps.valueAsNumber }),
    seed: at("new-seed").checked ? Math.floor(Math.random() * (Number(seed.max) + 1)) : seed.valueAsNumber,
    n: count.valueAsNumber,
    size: at("size").value || "auto",
  };
}

/** Show the seed that an image is drawn with. */
export function showSeed(value) {
  seed.value = value;
  showValues();
}

/** Set the page's settings to these fields of a request. */
export function writeSettings(fields) {
  guidance.value = fields.guidance_scale;
  if (!codes) steps.value = fields.steps;
  count.value = fields.n;
  at("size").value = fields.size;
  at("new-seed").checked = false;
  showSeed(fields.seed);
}

/** Settings as text. */
export function describeSettings({ guidance_scale, steps, seed }) {
  return `guidance\u00a0scale\u00a0${guidance_scale}, ${codes ? "" : `${steps}\u00a0steps, `}seed\u00a0${seed}`;
}

/** Number of steps of an image with these settings. */
export function countSteps(settings) {
  return codes ? codes[settings.size] : settings.steps;
}

/** Set the ranges and defaults for this model, an entry of /v1/models. */
export function applyModel(model) {
  const { guidance_scale, steps: defaultSteps } = model.generation;
  guidance.max = Math.max(10, 2 * guidance_scale);
  guidance.value = guidance_scale;
  steps.max = Math.max(100, 2 * defaultSteps);
  steps.value = defaultSteps;
  codes = model.image_steps;
  at("steps-setting").hidden = Boolean(codes);
  count.max = model.max_n;
  at("size").replaceChildren(...model.sizes.map((size) => make("option", { value: size }, size)));
  at("size-setting").hidden = model.sizes.length < 2;
  showValues();
}

function showValues() {
  for (const name of SLIDERS) at(`${name}-value`).value = at(name).value;
}

function fold() {
  at("settings").open = wide.matches;
}
