// The pool as the gateway tells it: columns over block ids, names, steps, totals of waits.

const NOBODY = -1;
const NUM_STEPS = 400;
const WINDOW_MS = 60_000;

const ARRAYS = {
  kind: Uint8Array, references: Int32Array, holder: Float64Array, operation: Uint8Array,
  cause: Uint8Array, step: Float64Array, seen: Float64Array,
};

function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

export class Pool {
  constructor() {
    this.version = 0;
    this.numBlocks = 0;
    this.numWhole = 0;
    this.numChanges = 0;
    this.kinds = [];
    this.columns = {};
    this.several = new Map();
    this.names = new Map();
    this.tenants = [];
    this.steps = [];
    this.stalls = [];
    this.operation = 0;
    this.step = 0;
    this.isOperator = true;
    this.away = "";
  }

  /** Take a frame in. Returns the ids of blocks that look otherwise now; null for all. */
  take(frame) {
    this.version = frame.version;
    this.away = frame.away;
    if (frame.whole) this.begin(frame);
    this.steps.push(...frame.steps);
    this.steps.splice(0, this.steps.length - NUM_STEPS);
    this.stalls.push(...frame.stalls);
    const newest = this.stalls.at(-1)?.[0] ?? 0;
    while (this.stalls.length > 1 && this.stalls[1][0] <= newest - WINDOW_MS) this.stalls.shift();
    if (!frame.columns) return [];
    this.operation = frame.operation;
    this.step = frame.step;
    this.tenants = frame.tenants;
    for (const [sequence, tenant, request, since] of frame.names) {
      this.names.set(sequence, { tenant, request, since });
    }
    return this.takeColumns(frame);
  }

  begin(frame) {
    this.numWhole += 1;
    this.numBlocks = frame.num_blocks ?? 0;
    this.blockSize = frame.block_size;
    this.kinds = frame.kinds;
    this.operations = frame.operations;
    this.causes = frame.causes;
    this.isOperator = frame.is_operator;
    this.steps = [];
    this.stalls = [];
    this.names.clear();
    this.several.clear();
  }

  /** Know nothing of any pool; what waits were is the gateway's, and comes again. */
  forget() {
    this.numBlocks = this.blockSize = this.operation = this.step = 0;
    this.columns = {};
    this.tenants = [];
    this.steps = [];
    this.stalls = [];
    this.names.clear();
    this.several.clear();
  }

  takeColumns(frame) {
    const ids = frame.ids === undefined ? null : new Uint32Array(bytesOf(frame.ids).buffer);
    const before = ids === null ? null : Array.from(ids, (id) => this.looks(id));
    for (const [name, text] of Object.entries(frame.columns)) {
      const values = new ARRAYS[name](bytesOf(text).buffer);
      if (ids === null) {
        this.columns[name] = values;
      } else {
        const column = this.columns[name];
        for (let index = 0; index < ids.length; index++) column[ids[index]] = values[index];
      }
    }
    if (ids !== null) {
      this.numChanges += ids.length;
      for (const id of ids) this.several.delete(id);
    }
    for (const [id, ...sequences] of frame.holders) this.several.set(id, sequences);
    return ids === null ? null : Array.from(ids).filter((id, at) => this.looks(id) !== before[at]);
  }

  /** What decides the colour of a block, as one number. */
  looks(id) {
    return this.columns.holder[id] * 16 + this.columns.kind[id];
  }

  kind(id) {
    return this.kinds[this.columns.kind[id]];
  }

  /** Sequences that have the block in their tables; 0 for what is not for us. */
  holdersOf(id) {
    const first = this.columns.holder[id];
    return this.several.get(id) ?? (first === NOBODY ? [] : [first]);
  }

  tenantOf(sequence) {
    return this.names.get(sequence)?.tenant ?? "";
  }

  /** How many blocks are of each kind, and what each sequence and tenant holds. */
  tally() {
    const kinds = new Array(this.kinds.length).fill(0);
    const sequences = new Map();
    const { kind, holder, references } = this.columns;
    const count = (sequence, id) => {
      const held = sequences.get(sequence) ?? { sequence, blocks: 0, shared: 0 };
      held.blocks += 1;
      held.shared += references[id] > 1;
      sequences.set(sequence, held);
    };
    for (let id = 0; id < this.numBlocks; id++) {
      kinds[kind[id]] += 1;
      if (holder[id] !== NOBODY && !this.several.has(id)) count(holder[id], id);
    }
    for (const [id, holders] of this.several) for (const sequence of holders) count(sequence, id);
    return { kinds, sequences };
  }

  /** Blocks of one sequence. */
  blocksOf(sequence) {
    const found = [];
    for (let id = 0; id < this.numBlocks; id++) {
      if (this.columns.holder[id] === sequence || this.several.get(id)?.includes(sequence)) {
        found.push(id);
      }
    }
    return found;
  }

  /** Milliseconds by cause of what ended in the last minute, the longest first. */
  waits() {
    if (this.stalls.length < 2) return [];
    const [, computeBefore, before] = this.stalls[0];
    const [, computeNow, now] = this.stalls.at(-1);
    const rows = Object.keys(now).map((cause) => [cause, now[cause] - (before[cause] ?? 0)]);
    rows.sort((one, other) => other[1] - one[1]);
    return [["computing", computeNow - computeBefore], ...rows].filter(([, ms]) => ms > 0.05);
  }
}
