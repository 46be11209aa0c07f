// Helpers: find and create elements, read image files.

/** The element with this id. */
export function at(id) {
  return document.getElementById(id);
}

/** A new element with properties and children; strings become text, never markup. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A drawn image, shown with sharp pixels. `base64`: a PNG file. */
export function drawnImage(base64, alt) {
  return make("img", { src: pngUrl(base64), alt, className: "drawn" });
}

export function pngUrl(base64) {
  return `data:image/png;base64,${base64}`;
}

/** A file as a data: URL. Throws an Error with one sentence when it is not an image. */
export function readImage(file) {
  if (!file.type.startsWith("image/")) return Promise.reject(new Error(`${file.name} is not an image`));
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${file.name} cannot be read`)));
    reader.readAsDataURL(file);
  });
}
