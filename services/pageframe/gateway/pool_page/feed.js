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
   * @param {() => string} query which replica is meant, with its question mark; empty for the first.
   */
  constructor(on, key, query) {
    this.on = on;
    this.key = key;
    this.query = query;
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

  /** Look anew: another replica is meant now. */
  turn() {
    this.abort?.abort();
    this.abort = null;
    this.look();
  }

  async run(signal) {
    while (!signal.aborted) {
      try {
        const isOfUse = await this.follow(signal);
        // Whoever ended this may have begun another one.
        if (signal.aborted) return;
        if (!isOfUse) {
          this.abort = null;
          return;
        }
      } catch (error) {
        if (signal.aborted) return;
        this.on.state("away", "the gateway does not answer; trying again");
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  /** Follow one stream to its end; false where trying again is of no use. */
  async follow(signal) {
    const path = `pool/events${this.query()}`;
    const response = await fetch(path, { signal, headers: this.headers() });
    if (!response.ok) {
      const { error } = await response.json();
      if (signal.aborted) return false;
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
      if (signal.aborted) return false;
      if (data === "[DONE]") break;
      const frame = JSON.parse(data);
      if (frame.error) this.on.state("away", frame.error.message);
      else this.on.frame(frame);
    }
    if (!signal.aborted) this.on.state("away", "the gateway ended the view; trying again");
    return true;
  }

  /** What the executor knows of one block; null when it does not say. */
  async explain(blockId, signal) {
    const path = `pool/blocks/${blockId}${this.query()}`;
    const response = await fetch(path, { signal, headers: this.headers() });
    return response.ok ? response.json() : null;
  }
}
