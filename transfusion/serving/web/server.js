// Requests to the server: JSON answers, streams of events, and the server's error messages.
import { askForKey } from "./key.js";

const KEY = "transfusion-key"; // in sessionStorage: for this tab, until it is closed

/** JSON from a path. Throws an Error with one sentence. */
export async function get(path) {
  return (await request(path, {})).json();
}

/** The events of a streamed answer. Aborting the signal, or leaving the loop, cancels the request on the server. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice("data: ".length);
        if (data === undefined) continue; // a comment: the request still waits
        if (data === "[DONE]") return;
        const content = JSON.parse(data);
        if (content.error) throw new Error(content.error.message);
        yield content;
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new Error("the connection to the server was lost") : error;
  } finally {
    reader.cancel().catch(() => {}); // cancel() of a failed stream is an error
  }
}

/** The deltas of a chat answer: { content }, { preview } or { images }. */
export async function* streamChat(body, signal) {
  let isFinished = false;
  for await (const { choices: [{ delta, finish_reason }] } of stream("v1/chat/completions", body, signal)) {
    isFinished ||= Boolean(finish_reason);
    yield delta;
  }
  if (!isFinished) throw new Error("the answer ended before it was complete");
}

async function request(path, options) {
  for (;;) {
    const response = await send(path, options);
    if (response.ok) return response;
    const message = await readError(response);
    if (response.status !== 401) throw new Error(message);
    sessionStorage.removeItem(KEY);
    sessionStorage.setItem(KEY, await askForKey(message));
  }
}

async function send(path, options) {
  const key = sessionStorage.getItem(KEY);
  // As the password of Basic, which may have any characters.
  const headers = key === null ? options.headers : { ...options.headers, Authorization: `Basic ${base64(`:${key}`)}` };
  try {
    return await fetch(path, { ...options, headers, credentials: "omit" }); // otherwise the browser asks for the key itself
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached");
  }
}

async function readError(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

function base64(text) {
  return btoa(String.fromCharCode(...new TextEncoder().encode(text)));
}
