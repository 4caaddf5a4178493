// Which replica's pool is shown: a list to choose from, and the choice in the page's address.

const ASK_MS = 3000;
const PARAMETER = "replica";

export class Replicas {
  /**
   * @param {HTMLSelectElement} select
   * @param {HTMLElement} frame what is shown where there is something to choose.
   * @param {() => object} headers of every question.
   * @param {() => void} change another replica was chosen.
   */
  constructor(select, frame, headers, change) {
    this.select = select;
    this.frame = frame;
    this.headers = headers;
    this.change = change;
    this.told = [];
    select.addEventListener("change", () => {
      const address = new URL(location.href);
      address.searchParams.set(PARAMETER, select.value);
      history.pushState(null, "", address);
      this.change();
    });
    addEventListener("popstate", () => { this.render(); this.change(); });
    document.addEventListener("visibilitychange", () => this.ask());
    this.ask();
  }

  /** The replica that the page's address names; empty for the first. */
  get chosen() {
    return new URLSearchParams(location.search).get(PARAMETER) ?? "";
  }

  /** What is behind a path's question mark to ask about the chosen one. */
  get query() {
    return this.chosen ? `?${new URLSearchParams({ [PARAMETER]: this.chosen })}` : "";
  }

  /** Ask how full they are, again and again while the page is seen. */
  async ask() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    try {
      const response = await fetch("pool/replicas", { headers: this.headers() });
      if (response.ok) {
        this.told = (await response.json()).replicas;
        this.render();
      }
    } catch {
      // The gateway is away; the page says so by itself.
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), ASK_MS);
  }

  render() {
    const entries = this.told.map(({ replica, pool }) => [replica, shareOf(pool)]);
    const chosen = this.chosen || (entries[0]?.[0] ?? "");
    if (chosen && !entries.some(([name]) => name === chosen)) entries.push([chosen, "not there"]);
    this.frame.hidden = entries.length < 2;
    entries.forEach(([name, share], index) => {
      const option = this.select.options[index] ?? this.select.appendChild(new Option());
      option.value = name;
      option.textContent = `${name}: ${share}`;
    });
    // Options are kept: a list that is open does not jump.
    this.select.length = entries.length;
    this.select.value = chosen;
  }
}

function shareOf(pool) {
  if (pool === null) return "away";
  return `${(100 * (pool.free + pool.cached) / Math.max(1, pool.total)).toFixed(0)} % free`;
}
