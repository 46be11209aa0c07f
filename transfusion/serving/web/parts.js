// Pieces of the page: found by id, made anew, and pictures read from files.

/** The element with this id. */
export function at(id) {
  return document.getElementById(id);
}

/** A new element: its properties, then its children; what is handed in as text stays text. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A picture that the model drew, from the base64 of a PNG file: shown with sharp pixels. */
export function drawn(base64, alt) {
  return make("img", { src: pngUrl(base64), alt, className: "drawn" });
}

export function pngUrl(base64) {
  return `data:image/png;base64,${base64}`;
}

/** A file as a data: URL. Throws an Error with one sentence when it is no picture. */
export function readPicture(file) {
  if (!file.type.startsWith("image/")) return Promise.reject(new Error(`${file.name} is not a picture`));
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${file.name} cannot be read`)));
    reader.readAsDataURL(file);
  });
}
