// Requests to this server, and answers as they come: server-sent events over fetch, since EventSource cannot POST.

import { settings } from "./settings.js";

async function failure(response) {
  let message = `the server answered ${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not this server's format: a proxy's, perhaps
  }
  const after = response.headers.get("Retry-After");
  return Object.assign(new Error(after ? `${message}; try again in ${after} s` : message), { status: response.status });
}

async function call(path, options) {
  const key = settings.key();
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`the server cannot be reached: ${error.message}`);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export const models = async () => (await (await call("v1/models")).json()).data;

// {name, data} of each event; data as text.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const field = (name) =>
        lines.filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2)).join("\n");
      yield { name: field("event"), data: field("data") };
    }
  }
}

// One answer as far as it is known. Times are in milliseconds.
export class Answer {
  text = "";
  thought = "";
  frames = []; // a canvas after a step each
  tokens = 0;
  steps = 0;
  canvases = 0;
  seed = null;
  reason = null; // why it ended
  holes = null; // of /v1/infill: {text, start, token_ids}
  tried = null; // of /v1/infill: lengths of holes, with their log-probabilities
  firstCanvas = null;
  began = performance.now();
  ended = null;
  last = new Map();

  get seconds() {
    return ((this.ended ?? performance.now()) - this.began) / 1000;
  }

  // A chunk of a stream; true where it adds a frame.
  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const { draft, settled } = chunk.diffusion ?? {};
    if (draft) this.frames.push(this.frame(draft));
    if (settled) this.firstCanvas ??= performance.now() - this.began;
    for (const choice of chunk.choices ?? []) {
      this.text += choice.delta?.content ?? choice.text ?? "";
      this.thought += choice.delta?.reasoning_content ?? "";
      this.reason = choice.finish_reason ?? this.reason;
      this.holes = choice.holes ?? this.holes;
      if (choice.diffusion) this.settle(choice.diffusion);
    }
    return draft !== undefined;
  }

  // Of several lengths of a hole each has its own steps.
  frame(draft) {
    const key = String(draft.lengths);
    const before = this.last.get(key);
    const step = before?.canvas === draft.canvas ? before.step + 1 : 1;
    const frame = { ...draft, key, step, pieces: draft.pieces ?? draft.token_ids.map(String) };
    this.last.set(key, frame);
    return frame;
  }

  settle(diffusion) {
    this.seed = diffusion.seed ?? this.seed;
    this.tried = diffusion.tried ?? this.tried;
    if (diffusion.canvases !== undefined) {
      this.tokens = diffusion.token_ids.length;
      this.steps = diffusion.steps;
      this.canvases = diffusion.canvases;
    } else if (diffusion.canvas !== undefined) {
      this.firstCanvas ??= performance.now() - this.began;
      this.tokens += diffusion.token_ids.length;
      this.steps += diffusion.steps;
      this.canvases += 1;
    }
  }
}

// Ask and stream. `heard(answer, isFrame)` is called for each event; the answer is returned when it is whole.
export async function ask(path, body, signal, heard) {
  const options = { drafts: true, include_usage: true };
  const whole = { ...body, stream: true, stream_options: options };
  const answer = new Answer();
  const response = await call(path, { method: "POST", body: JSON.stringify(whole), signal });
  for await (const { data } of events(response.body)) {
    if (data === "[DONE]") {
      answer.ended = performance.now();
      heard(answer, false);
      return answer;
    }
    if (data) heard(answer, answer.take(JSON.parse(data)));
  }
  throw new Error("the connection ended before the answer did");
}
