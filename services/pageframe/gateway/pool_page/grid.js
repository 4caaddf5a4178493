// One cell for each block on a canvas. Only cells that changed are drawn.

const SIZE_MAX = 26;
const SIZE_MIN = 3;
const FLASH_MS = 450;

export class Grid {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {(id: number) => string} colourOf
   */
  constructor(canvas, colourOf) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.colourOf = colourOf;
    this.numCells = 0;
    this.numDrawn = 0;
    this.dirty = new Set();
    this.flashes = new Map();
    this.marked = new Set();
    this.cursor = -1;
    this.isWhole = true;
    this.isStill = matchMedia("(prefers-reduced-motion: reduce)");
  }

  /** Fit so many cells into the room there is: as large as they can be. */
  layOut(numCells, width, height) {
    this.numCells = numCells;
    let size = SIZE_MAX;
    const rows = () => Math.ceil(numCells / Math.max(1, Math.floor(width / size)));
    while (size > SIZE_MIN && rows() * size > height) size -= 1;
    this.size = size;
    this.numColumns = Math.max(1, Math.floor(width / size));
    this.gap = size >= 6 ? 1 : size >= 4 ? 0.5 : 0;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.numColumns * size * scale);
    this.canvas.height = Math.round(Math.max(1, rows()) * size * scale);
    this.canvas.style.width = `${this.numColumns * size}px`;
    this.canvas.style.height = `${Math.max(1, rows()) * size}px`;
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    this.isWhole = true;
  }

  /** Draw these again, and let them flash; null for all, without. */
  change(ids) {
    if (ids === null) {
      this.isWhole = true;
      this.flashes.clear();
      return;
    }
    const now = performance.now();
    for (const id of ids) {
      this.dirty.add(id);
      if (!this.isStill.matches) this.flashes.set(id, now);
    }
  }

  /** Outline these blocks and no others. */
  mark(ids) {
    for (const id of this.marked) this.dirty.add(id);
    this.marked = new Set(ids);
    for (const id of this.marked) this.dirty.add(id);
  }

  moveCursor(id) {
    this.dirty.add(this.cursor).add(id);
    this.cursor = id;
  }

  /** The block at a place of the canvas; -1 for none. */
  blockAt(x, y) {
    const column = Math.floor(x / this.size);
    if (x < 0 || y < 0 || column >= this.numColumns) return -1;
    const id = Math.floor(y / this.size) * this.numColumns + column;
    return id < this.numCells ? id : -1;
  }

  placeOf(id) {
    return [(id % this.numColumns) * this.size, Math.floor(id / this.numColumns) * this.size];
  }

  /** Draw what has to be drawn; called once for each picture of the screen. */
  draw(now) {
    if (this.isWhole) {
      this.isWhole = false;
      this.dirty.clear();
      this.context.fillStyle = this.ground;
      this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
      for (let id = 0; id < this.numCells; id++) this.drawCell(id, 0);
    }
    for (const [id, start] of this.flashes) {
      const left = 1 - (now - start) / FLASH_MS;
      if (left <= 0) this.flashes.delete(id);
      this.dirty.delete(id);
      this.drawCell(id, Math.max(0, left));
    }
    for (const id of this.dirty) this.drawCell(id, 0);
    this.dirty.clear();
  }

  drawCell(id, flash) {
    if (id < 0 || id >= this.numCells) return;
    this.numDrawn += 1;
    const { context, size, gap } = this;
    const [x, y] = this.placeOf(id);
    context.fillStyle = this.ground;
    context.fillRect(x, y, size, size);
    context.fillStyle = this.colourOf(id);
    context.fillRect(x, y, size - gap, size - gap);
    if (flash) {
      context.globalAlpha = 0.6 * flash;
      context.fillStyle = this.flash;
      context.fillRect(x, y, size - gap, size - gap);
      context.globalAlpha = 1;
    }
    if (this.marked.has(id) || id === this.cursor) {
      const width = Math.max(1, Math.min(2, size / 6));
      context.strokeStyle = this.outline;
      context.lineWidth = width;
      context.strokeRect(x + width / 2, y + width / 2, size - gap - width, size - gap - width);
    }
  }
}
