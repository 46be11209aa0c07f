// Asks the server: plain answers, streams of events, and its errors in its own sentence.
import { askForKey } from "./key.js";

const KEPT = "transfusion-key"; // in sessionStorage: for this tab, until it is closed

/** JSON from a path. Throws an Error with one sentence. */
export async function get(path) {
  return (await ask(path, {})).json();
}

/** The events of a streamed answer, one object each. Ending the signal, or leaving the loop, frees what the server works with. */
export async function* stream(path, body, signal) {
  const answer = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const lines = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await lines.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice("data: ".length);
        if (data === "[DONE]") return;
        const said = JSON.parse(data);
        if (said.error) throw new Error(said.error.message);
        yield said;
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new Error("the answer broke off: the server went away") : error;
  } finally {
    lines.cancel().catch(() => {}); // a stream that has failed cannot be cancelled any more
  }
}

/** What a model says to these messages, piece by piece: { content }, { preview } or { images }. */
export async function* answerTo(body, signal) {
  let ended = false;
  for await (const { choices: [{ delta, finish_reason }] } of stream("v1/chat/completions", body, signal)) {
    ended ||= Boolean(finish_reason);
    yield delta;
  }
  if (!ended) throw new Error("the answer broke off before its end");
}

async function ask(path, options) {
  for (;;) {
    const answer = await send(path, options);
    if (answer.ok) return answer;
    const sentence = await sentenceOf(answer);
    if (answer.status !== 401) throw new Error(sentence);
    sessionStorage.removeItem(KEPT);
    sessionStorage.setItem(KEPT, await askForKey(sentence));
  }
}

async function send(path, options) {
  const key = sessionStorage.getItem(KEPT);
  // As the password of Basic, which takes letters of every kind.
  const headers = key === null ? options.headers : { ...options.headers, Authorization: `Basic ${base64(`:${key}`)}` };
  try {
    return await fetch(path, { ...options, headers, credentials: "omit" }); // or the browser would ask for the key itself
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached");
  }
}

async function sentenceOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered with status ${answer.status}`;
  }
}

function base64(text) {
  return btoa(String.fromCharCode(...new TextEncoder().encode(text)));
}
