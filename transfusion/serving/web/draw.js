// The Draw tab: sends the prompt and shows the image at each step, from noise to the result.
import { describe } from "./describe.js";
import { at, drawnImage, make, pngUrl } from "./dom.js";
import { addToGallery } from "./gallery.js";
import { stream } from "./server.js";
import { countSteps, describeSettings, readSettings, showSeed, writeSettings } from "./settings.js";
import { taskOf } from "./task.js";

const COLUMNS = 8; // of the film strip
const MAX_PREVIEWS = 25; // of each image

const form = at("draw-form");
const start = taskOf(form, run);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const settings = readSettings();
  showSeed(settings.seed);
  start(at("prompt").value.trim(), settings);
});

/** Draw again with this prompt and these settings. */
function drawAgain(prompt, settings) {
  at("prompt").value = prompt;
  writeSettings(settings);
  form.scrollIntoView({ block: "nearest" });
  start(prompt, settings);
}

async function run(report, signal, prompt, settings) {
  const name = prompt || "an image without a prompt";
  const [progress, frames] = [at("progress"), makeFrames(name, settings)];
  const steps = countSteps(settings);
  const film = new FilmStrip(name, steps, settings.n);
  report(`Waiting to draw ${name}.`);
  let numFinished = 0;
  try {
    const body = { prompt, ...settings, preview_every: Math.ceil(steps / MAX_PREVIEWS) };
    for await (const event of stream("v1/images/generations", body, signal)) {
      const frame = frames[event.index];
      if (event.type.endsWith(".partial_image")) {
        report(`Drawing ${name}.`);
        progress.hidden = false;
        progress.value = event.step / steps;
        frame.src = pngUrl(event.noisy_b64_json);
        if (event.index === 0) film.add(event);
      } else {
        const src = (frame.src = pngUrl(event.b64_json));
        frame.alt = name;
        const actions = { Again: () => drawAgain(prompt, settings), Describe: () => describe(src) };
        addToGallery({ name, src, details: describeSettings(settings) }, actions);
        numFinished += 1;
      }
    }
  } finally {
    progress.hidden = true;
    for (const frame of frames) if (!frame.hasAttribute("src")) frame.remove();
  }
  if (numFinished < settings.n) throw new Error("the answer ended before all images were drawn");
  report(`Drawn: ${name}, ${numFinished} ${numFinished === 1 ? "image" : "images"}, seed ${settings.seed}.`);
}

/** Empty frames for the new images; older images are removed. */
function makeFrames(name, { n, size }) {
  const [width, height] = size === "auto" ? [1, 1] : size.split("x");
  const frames = Array.from({ length: n }, () => make("img", { className: "drawn", alt: `${name}, in progress` }));
  for (const frame of frames) frame.style.aspectRatio = `${width} / ${height}`;
  at("frames").className = n === 1 ? "" : n <= 4 ? "few" : "many";
  at("frames").replaceChildren(...frames);
  return frames;
}

/** The film strip: the noisy image (x_t) and the model's prediction (x0) at a few steps. */
class FilmStrip {
  constructor(name, steps, n) {
    [this.steps, this.name, this.column] = [steps, name, -1];
    this.rows = ["step", "noisy", "predicted"].map((label) => [make("b", {}, label)]);
    at("film-title").textContent = n === 1 ? "Denoising steps" : "Denoising steps of the first image";
    at("film").hidden = true;
  }

  /** Add this step, if it belongs to the next of the evenly spaced columns. */
  add({ step, noisy_b64_json, b64_json }) {
    this.first ??= step;
    const column = Math.floor(((step - this.first) * (COLUMNS - 1)) / Math.max(1, this.steps - this.first));
    if (column === this.column) return;
    this.column = column;
    const [numbers, noisy, predicted] = this.rows;
    numbers.push(make("small", {}, String(step)));
    noisy.push(drawnImage(noisy_b64_json, `${this.name}, noisy image at step ${step}`));
    predicted.push(drawnImage(b64_json, `${this.name}, predicted image at step ${step}`));
    const makeEmpty = () => Array.from({ length: COLUMNS + 1 - numbers.length }, () => make("span"));
    at("film-strip").replaceChildren(...this.rows.flatMap((row) => [...row, ...makeEmpty()]));
    at("film").hidden = false;
  }
}
