// How a picture is drawn: the sliders' values, set to what the run was made for.
import { at, make } from "./parts.js";

const SLIDERS = ["guidance", "steps", "count", "seed"];
const [guidance, steps, count, seed] = SLIDERS.map(at);
let codes = null; // by size: how many an image has, where it is drawn code by code; nobody chooses its steps then

for (const name of SLIDERS) at(name).addEventListener("input", showValues);
seed.addEventListener("input", () => (at("fresh").checked = false));

/** What the sliders say, as fields of a request. A fresh seed is drawn here, so that it can be shown and used again. */
export function settings() {
  if (at("fresh").checked) seed.value = Math.floor(Math.random() * (Number(seed.max) + 1));
  showValues();
  return {
    guidance_scale: guidance.valueAsNumber,
    ...(codes ? {} : { steps: steps.valueAsNumber }),
    seed: seed.valueAsNumber,
    n: count.valueAsNumber,
    size: at("size").value || "auto",
  };
}

/** Set the sliders to these fields of a request. */
export function set(fields) {
  guidance.value = fields.guidance_scale;
  if (!codes) steps.value = fields.steps;
  seed.value = fields.seed;
  count.value = fields.n;
  at("size").value = fields.size;
  at("fresh").checked = false;
  showValues();
}

/** These fields for a reader. */
export function inWords({ guidance_scale, steps, seed }) {
  return `guidance\u00a0${guidance_scale}, ${codes ? "" : `${steps}\u00a0steps, `}seed\u00a0${seed}`;
}

/** How many steps an image takes that is drawn with these settings. */
export function stepsOf(settings) {
  return codes ? codes[settings.size] : settings.steps;
}

/** What this run allows, and what it was made for. */
export function fit(model) {
  const { guidance_scale, steps: usual } = model.generation;
  guidance.max = Math.max(10, 2 * guidance_scale);
  guidance.value = guidance_scale;
  steps.max = Math.max(100, 2 * usual);
  steps.value = usual;
  codes = model.image_steps;
  at("steps-dial").hidden = Boolean(codes);
  count.max = model.max_n;
  at("size").replaceChildren(...model.sizes.map((size) => make("option", { value: size }, size)));
  at("size-dial").hidden = model.sizes.length < 2;
  showValues();
}

function showValues() {
  for (const name of SLIDERS) at(`${name}-value`).value = at(name).value;
}
