// Server-sent events from a fetch: EventSource sends no headers, and a key must not stand in a URL.

/** The JSON values of a response's events, as they come; "[DONE]" ends them. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split('\n\n');
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith('data: ')) continue; // a comment that keeps the connection open
        const data = part.slice(6);
        if (data === '[DONE]') return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
