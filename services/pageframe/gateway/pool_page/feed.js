// The events of the gateway: frames of the pool, as they come, for as long as the page is seen.
//
// `EventSource` can send no header, so no key: this reads the same events from `fetch`.

const RETRY_MS = 1000;

/** Yields the data of each server-sent event of a response's body. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice(6);
    }
  }
}

export class Feed {
  /**
   * @param {object} on what to do: frame(frame), state(word, sentence), ask(sentence).
   * @param {() => string} key the API key; empty for none.
   */
  constructor(on, key) {
    this.on = on;
    this.key = key;
    this.numOpened = 0;
    this.abort = null;
    document.addEventListener("visibilitychange", () => this.look());
  }

  headers() {
    return this.key() ? { authorization: `Bearer ${this.key()}` } : {};
  }

  /** Look while the page is seen; a page that nobody sees costs the executor nothing. */
  look() {
    if (document.hidden) {
      this.abort?.abort();
      this.abort = null;
    } else if (!this.abort) {
      this.abort = new AbortController();
      this.run(this.abort.signal);
    }
  }

  async run(signal) {
    while (!signal.aborted) {
      try {
        if (!(await this.follow(signal))) {
          this.abort = null;
          return;
        }
        this.on.state("away", "the gateway ended the view; trying again");
      } catch (error) {
        if (signal.aborted) return;
        this.on.state("away", "the gateway does not answer; trying again");
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  /** Follow one stream to its end; false where trying again is of no use. */
  async follow(signal) {
    const response = await fetch("pool/events", { signal, headers: this.headers() });
    if (!response.ok) {
      const { error } = await response.json();
      if (response.status === 401) {
        const isMissing = error.reason === "CREDENTIALS_MISSING";
        this.on.state("away", "an API key is needed");
        this.on.ask(isMissing ? "This gateway asks who is looking." : "The key is not known.");
      } else {
        this.on.state("away", error.message);
      }
      return response.status !== 401 && response.status !== 403;
    }
    this.numOpened += 1;
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") break;
      const frame = JSON.parse(data);
      if (frame.error) this.on.state("away", frame.error.message);
      else this.on.frame(frame);
    }
    return true;
  }

  /** What the executor knows of one block; null when it does not say. */
  async explain(blockId, signal) {
    const response = await fetch(`pool/blocks/${blockId}`, { signal, headers: this.headers() });
    return response.ok ? response.json() : null;
  }
}
