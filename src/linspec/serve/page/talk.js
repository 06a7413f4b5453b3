// The server: models, answers as they are written, live figures. Addresses are relative to the page.

/** An answer other than 200, with the server's own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function reached(response) {
  if (response.ok) return response;
  let said = response.statusText;
  try {
    const { error } = await response.json();
    said = error?.message ?? said;
  } catch { /* no JSON: the status says it */ }
  throw new Refused(response.status, said || `status ${response.status}`);
}

/** Yields the data of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Names of the models. */
export async function models(key) {
  const found = await (await reached(await fetch("v1/models", { headers: headers(key) }))).json();
  return found.data.map((each) => each.id);
}

/** Yields {text, linspec, usage, finish} of an answer; `signal` stops it. */
export async function* answer(path, body, key, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true, include_drafts: true } };
  const response = await reached(await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(asked),
    signal,
  }));
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(500, chunk.error.message);
    const choice = chunk.choices?.[0] ?? {};
    yield {
      text: choice.delta?.content ?? choice.text ?? "",
      linspec: choice.linspec ?? chunk.linspec,
      usage: chunk.usage,
      finish: choice.finish_reason,
    };
  }
}

/** Yields the live figures, one object a second, until the connection ends. */
export async function* live(key, signal) {
  const response = await reached(await fetch("linspec/live", { headers: headers(key), signal }));
  for await (const data of events(response)) yield JSON.parse(data);
}
