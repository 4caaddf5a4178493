// What is told of the block under the pointer or the keyboard's cursor.

const ASK_AFTER_MS = 80;
const ASK_AGAIN_MS = 1000;
const NS_PER_MS = 1e6;

export function age(ms) {
  const seconds = Math.max(0, ms) / 1000;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 100) return `${seconds.toFixed(0)} s`;
  return seconds < 6000 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

export class Tip {
  constructor(pool, feed, element, told) {
    this.pool = pool;
    this.feed = feed;
    this.element = element;
    this.told = told;
    this.blockId = -1;
    this.known = null;
    this.timer = 0;
    this.abort = new AbortController();
  }

  /** Tell of a block, beside a place of the window. */
  show(blockId, x, y) {
    this.place = [x, y];
    if (blockId !== this.blockId) {
      this.hide();
      this.blockId = blockId;
      this.timer = setTimeout(() => this.ask(), ASK_AFTER_MS);
    }
    this.render();
  }

  hide() {
    clearTimeout(this.timer);
    this.abort.abort();
    this.abort = new AbortController();
    this.blockId = -1;
    this.known = null;
    this.element.hidden = true;
  }

  /** Ask the executor, and again while somebody looks: what it says may change. */
  async ask() {
    const { blockId, abort } = this;
    try {
      const known = await this.feed.explain(blockId, abort.signal);
      if (abort.signal.aborted) return;
      this.known = known;
      this.render();
      this.told.textContent = this.element.innerText.replaceAll("\n", ", ");
    } catch {
      if (abort.signal.aborted) return;
      // The gateway is away; the page says so by itself.
    }
    this.timer = setTimeout(() => this.ask(), ASK_AGAIN_MS);
  }

  rows() {
    const { pool, blockId, known } = this;
    const { operation, cause, step, references } = pool.columns;
    const holders = pool.holdersOf(blockId);
    const rows = [["held by", holders.length ? holders.slice(0, 4).map((it) => this.who(it)) : []]];
    if (holders.length > 4) rows[0][1].push(`and ${holders.length - 4} more`);
    const tenants = new Set(holders.map((it) => pool.tenantOf(it)).filter(Boolean));
    if (known?.tenant) tenants.add(known.tenant);
    rows.push(["tenant", [...tenants]]);
    for (const { kind, name, expire_ns: expireNs } of known?.retentions ?? []) {
      rows.push([`kept by ${kind}`, [`${name}, for ${age(expireNs / NS_PER_MS - Date.now())}`]]);
    }
    if (references[blockId] > 1) rows.push(["references", [String(references[blockId])]]);
    const last = known?.operation || pool.operations[operation[blockId]];
    const why = known?.cause || pool.causes[cause[blockId]];
    const when = known?.step || step[blockId];
    rows.push(["last operation", last ? [last] : []], ["cause", why ? [why] : []]);
    rows.push(["step", when ? [when.toLocaleString("en")] : []]);
    const since = known?.time_ns / NS_PER_MS || pool.columns.seen[blockId];
    rows.push(["since", since ? [age(Date.now() - since)] : []]);
    if (known) rows.push(["prefix index", [known.indexed ? "can be found" : "not in it"]]);
    return rows.filter(([, lines]) => lines.length);
  }

  who(sequence) {
    if (!sequence) return this.pool.isOperator ? "no sequence" : "another tenant";
    const name = this.pool.names.get(sequence);
    return name ? `${name.request || "a request"} (sequence ${sequence})` : `sequence ${sequence}`;
  }

  render() {
    const { pool, blockId, element } = this;
    if (blockId < 0 || blockId >= pool.numBlocks) return;
    const title = document.createElement("b");
    title.textContent = `block ${blockId}: ${pool.kind(blockId)}`;
    const list = document.createElement("dl");
    for (const [name, lines] of this.rows()) {
      const term = document.createElement("dt");
      term.textContent = name;
      const value = document.createElement("dd");
      value.textContent = lines.join(", ");
      list.append(term, value);
    }
    element.replaceChildren(title, list);
    element.hidden = false;
    const [x, y] = this.place;
    const { width, height } = element.getBoundingClientRect();
    const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
    element.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
    element.style.top = `${Math.max(4, Math.min(y + 16, innerHeight - height - 4))}px`;
  }
}
