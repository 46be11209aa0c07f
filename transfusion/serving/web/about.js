// Facts about the model, from /v1/models.
import { at, make } from "./dom.js";

const BUILT_IN = { // name of a built-in source: its content, and an example prompt
  digits: ["images of handwritten digits with their names", "three"],
  shapes: ["synthetic images of coloured shapes with captions", "a large red circle above a small blue square"],
  topics: ["the reference manual of Python", null],
  photographs: ["two photographs", null],
};
const number = new Intl.NumberFormat("en");

/** Fill in everything that depends on the model, an entry of /v1/models. */
export function showModel(model) {
  const { id, recipe, parameters, step, sources, sizes, image_channels, generation } = model;
  const data = sources.map((name) => (BUILT_IN[name] ? `${name} (${BUILT_IN[name][0]})` : name)).join(", ");
  const size = sizes.join(", ").replaceAll("x", " × ");
  document.title = `${id} · transfusion`;
  at("name").textContent = id;
  at("summary").textContent = `One model for text and images: ${abbreviate(parameters)} parameters${data ? `, trained on ${sources.join(" and ")}` : ""}.`;
  at("input-size").textContent = `The model's image size is ${size} pixels${image_channels === 1 ? ", in grey" : ""}: your image is cropped to its centre and resized.`;
  const example = sources.map((name) => BUILT_IN[name]?.[1]).find(Boolean);
  at("prompt").placeholder = at("message").placeholder = example ? `for example: ${example}` : "";
  const facts = {
    Name: id,
    Recipe: recipe,
    Parameters: number.format(parameters),
    "Training steps": number.format(step),
    "Training data": data || "unknown",
    "Image size": `${size} pixels, ${image_channels === 1 ? "grey" : "colour"}`,
    "Context length": `${number.format(model.seq_len)} positions; a text token takes one, an image one per patch`,
    "Image defaults": `${model.image_steps ? "drawn code by code" : `${generation.steps} steps, sampler ${generation.sampler}`}, guidance scale ${generation.guidance_scale}`,
    "Text defaults": `at most ${generation.max_tokens} tokens, temperature ${generation.temperature}, top_p ${generation.top_p}`,
  };
  const rows = Object.entries(facts).map(([name, fact]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, fact)));
  at("facts").replaceChildren(...rows);
}

function abbreviate(count) {
  const [unit, word] = count >= 1e9 ? [1e9, " billion"] : count >= 1e6 ? [1e6, " million"] : [1, ""];
  return number.format(Number((count / unit).toPrecision(unit === 1 ? 12 : 2))) + word;
}
