// One task at a time for a form: a new task cancels the last one, Stop cancels it, and an error is shown as one sentence.

/** A function that starts `task(report, signal, ...args)`. `report` shows a sentence that screen readers announce. */
export function taskOf(form, task) {
  const [stop, status, error] = [".stop", ".status", ".error"].map((name) => form.querySelector(name));
  let current = null;
  let previous = Promise.resolve();
  stop.addEventListener("click", () => current?.abort());

  function start(...args) {
    current?.abort();
    const controller = (current = new AbortController());
    previous = previous.then(() => run(controller, args)); // when the last task has ended
  }

  async function run(controller, args) {
    if (current !== controller) return;
    const report = (sentence) => {
      // An equal sentence is not set again: it would be announced again.
      if (current === controller && status.textContent !== sentence) status.textContent = sentence;
    };
    error.textContent = "";
    stop.hidden = false;
    try {
      await task(report, controller.signal, ...args);
    } catch (problem) {
      report(controller.signal.aborted ? "Stopped." : "");
      if (current === controller && !controller.signal.aborted) error.textContent = problem.message;
    }
    if (current !== controller) return;
    current = null;
    if (document.activeElement === stop) form.querySelector("input, textarea").focus();
    stop.hidden = true;
  }

  return start;
}
