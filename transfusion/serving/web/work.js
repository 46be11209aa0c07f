// One piece of work at a time for a form: a new one ends the one before, Stop ends it, and its error is one sentence.

/** A function that begins `work(say, signal, ...what)`; `say` puts a sentence where screen readers hear it. */
export function workOf(form, work) {
  const [stop, status, error] = [".stop", ".status", ".error"].map((name) => form.querySelector(name));
  let current = null;
  let last = Promise.resolve();
  stop.addEventListener("click", () => current?.abort());

  function begin(...what) {
    current?.abort();
    const mine = (current = new AbortController());
    last = last.then(() => run(mine, what)); // when the one before has let go
  }

  async function run(mine, what) {
    if (current !== mine) return;
    const say = (sentence) => {
      if (current === mine && status.textContent !== sentence) status.textContent = sentence; // or it is read out again
    };
    error.textContent = "";
    stop.hidden = false;
    try {
      await work(say, mine.signal, ...what);
    } catch (problem) {
      say(mine.signal.aborted ? "Stopped." : "");
      if (current === mine && !mine.signal.aborted) error.textContent = problem.message;
    }
    if (current !== mine) return;
    current = null;
    if (document.activeElement === stop) form.querySelector("input, textarea").focus();
    stop.hidden = true;
  }

  return begin;
}
