// What the model is and was trained on, as far as the server says.
import { at, make } from "./parts.js";

const BUILT_IN = { // what the sources that come with the project hold, and something to ask for
  digits: ["scans of handwritten digits with their names", "three"],
  shapes: ["made scenes of coloured things", "a large red circle above a small blue square"],
  topics: ["the reference manual of Python", null],
  emoji: ["emoji with their names", "grinning face"],
  photographs: ["two photographs", null],
};
const number = new Intl.NumberFormat("en");

/** Fill in all places that speak of the model. `model`: its entry in /v1/models. */
export function tellOf(model) {
  const { id, parameters, step, sources, sizes, image_channels, generation } = model;
  const read = sources.map((name) => (BUILT_IN[name] ? `${name} (${BUILT_IN[name][0]})` : name)).join(", ");
  const size = sizes.join(", ").replaceAll("x", " × ");
  document.title = `${id} · transfusion`;
  at("name").textContent = id;
  at("summary").textContent = `${short(parameters)} parameters that read, write and draw, trained${read ? ` on ${sources.join(" and ")}` : ""}.`;
  at("sees").textContent = `It sees pictures in ${size} pixels${image_channels === 1 ? ", in grey" : ""}: yours is cut to its middle and made as small.`;
  const example = sources.map((name) => BUILT_IN[name]?.[1]).find(Boolean);
  at("prompt").placeholder = at("message").placeholder = example ? `for example: ${example}` : "";
  const facts = {
    Name: id,
    Parameters: number.format(parameters),
    "Steps of training": number.format(step),
    "Trained on": read || "not said",
    "Draws and sees": `${size} pixels, ${image_channels === 1 ? "grey" : "in colour"}`,
    "Reads and writes": `at most ${number.format(model.seq_len)} positions: pieces of words, and patches of pictures`,
    "Draws, unless told": `${model.image_steps ? "code by code" : `${generation.steps} steps of ${generation.sampler}`}, guidance ${generation.guidance_scale}`,
    "Writes, unless told": `at most ${generation.max_tokens} tokens, temperature ${generation.temperature}, top_p ${generation.top_p}`,
  };
  const rows = Object.entries(facts).map(([name, fact]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, fact)));
  at("facts").replaceChildren(...rows);
}

function short(count) {
  const [size, word] = count >= 1e9 ? [1e9, " billion"] : count >= 1e6 ? [1e6, " million"] : [1, ""];
  return number.format(Number((count / size).toPrecision(size === 1 ? 12 : 2))) + word;
}
