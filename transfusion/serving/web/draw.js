// Drawing: the prompt goes out, and the picture is watched as it comes out of the noise.
import * as dials from "./dials.js";
import { describe } from "./describe.js";
import { keep } from "./gallery.js";
import { at, drawn, make, pngUrl } from "./parts.js";
import { stream } from "./server.js";
import { workOf } from "./work.js";

const FRAMES = 8; // columns of the film strip
const SHOWN = 25; // how often a picture is seen on its way

const form = at("draw-form");
const begin = workOf(form, draw);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  begin(at("prompt").value.trim(), dials.settings());
});

/** Put a drawn picture on the shelf: it can be described, and whatever else is handed in. */
export function keepDrawn(picture, actions = {}) {
  keep(picture, { ...actions, Describe: () => describe(picture.src) });
}

/** Draw this with these settings, as if they had been set by hand. */
function drawAgain(prompt, settings) {
  at("prompt").value = prompt;
  dials.set(settings);
  form.scrollIntoView();
  begin(prompt, settings);
}

async function draw(say, signal, prompt, settings) {
  const name = prompt || "whatever comes to its mind";
  const [progress, places] = [at("progress"), framesFor(name, settings)];
  const steps = dials.stepsOf(settings);
  const film = new Film(name, steps, settings.n);
  say(`Waiting for its turn to draw ${name}.`);
  let finished = 0;
  try {
    const asked = { prompt, ...settings, preview_every: Math.ceil(steps / SHOWN) };
    for await (const event of stream("v1/images/generations", asked, signal)) {
      const picture = places[event.index];
      if (event.type.endsWith(".partial_image")) {
        say(`Drawing ${name}.`);
        progress.hidden = false;
        progress.value = event.step / steps;
        picture.src = pngUrl(event.noisy_b64_json);
        if (event.index === 0) film.add(event);
      } else {
        picture.src = pngUrl(event.b64_json);
        picture.alt = name;
        keepDrawn({ name, src: picture.src, how: dials.inWords(settings) }, { Again: () => drawAgain(prompt, settings) });
        finished += 1;
      }
    }
  } finally {
    progress.hidden = true;
    for (const picture of places) if (!picture.hasAttribute("src")) picture.remove();
  }
  if (finished < settings.n) throw new Error("the answer broke off before all was drawn");
  say(`Drawn: ${name}, ${finished} ${finished === 1 ? "picture" : "pictures"}, seed ${settings.seed}.`);
}

/** Places for the pictures that come, on the emptied stage. */
function framesFor(name, { n, size }) {
  const [width, height] = size === "auto" ? [1, 1] : size.split("x");
  const places = Array.from({ length: n }, () => make("img", { className: "drawn", alt: `${name}, on its way` }));
  for (const place of places) place.style.aspectRatio = `${width} / ${height}`;
  at("pictures").className = n === 1 ? "" : n <= 4 ? "few" : "many";
  at("pictures").replaceChildren(...places);
  return places;
}

/** The strip below: what the model saw at a few of its steps, and what it took the picture to be. */
class Film {
  constructor(name, steps, n) {
    [this.steps, this.name, this.frame] = [steps, name, -1];
    this.rows = ["step", "it sees", "it expects"].map((word) => [make("b", {}, word)]);
    at("film-title").textContent = n === 1 ? "How it came" : "How the first one came";
    at("film").hidden = true;
  }

  /** Shows this step when it is the next of a few that lie evenly from the first to the last. */
  add({ step, noisy_b64_json, b64_json }) {
    this.first ??= step;
    const frame = Math.floor(((step - this.first) * (FRAMES - 1)) / Math.max(1, this.steps - this.first));
    if (frame === this.frame) return;
    this.frame = frame;
    const [numbers, seen, expected] = this.rows;
    numbers.push(make("small", {}, String(step)));
    seen.push(drawn(noisy_b64_json, `${this.name}, as noisy as it is at step ${step}`));
    expected.push(drawn(b64_json, `${this.name}, as expected at step ${step}`));
    const empty = () => Array.from({ length: FRAMES + 1 - numbers.length }, () => make("span"));
    at("film-strip").replaceChildren(...this.rows.flatMap((row) => [...row, ...empty()]));
    at("film").hidden = false;
  }
}
