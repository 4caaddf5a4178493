// The step timeline: how long steps took, what they computed, what was free after them.
/* global uPlot */

const KINDS = [
  { name: "duration", unit: "ms", index: 2, colour: "--shared", bars: false, digits: 1 },
  { name: "batch", unit: "tokens", index: 4, colour: "--held", bars: true, digits: 0 },
  { name: "free", unit: "blocks", index: 5, colour: "--cached", bars: false, digits: 0 },
];
const HEIGHT = 150;

export class Timeline {
  constructor(folder, colour) {
    this.folder = folder;
    this.colour = colour;
    this.sync = uPlot.sync("steps");
    this.steps = [];
    this.build();
    new ResizeObserver(() => this.resize()).observe(folder);
  }

  /** Make the charts, again when the colours have changed. */
  build() {
    for (const { plot } of this.charts ?? []) plot.destroy();
    this.folder.replaceChildren();
    this.charts = KINDS.map((kind) => this.chart(kind));
    this.show(this.steps);
  }

  chart(kind) {
    const box = document.createElement("div");
    box.className = "chart";
    const title = document.createElement("h3");
    const value = document.createElement("b");
    title.append(`${kind.name}, ${kind.unit} `, value);
    box.append(title);
    this.folder.append(box);
    const axis = {
      stroke: this.colour("--quiet"), grid: { stroke: this.colour("--line"), width: 1 },
      ticks: { show: false }, font: "11px system-ui, sans-serif",
    };
    const colour = this.colour(kind.colour);
    const options = {
      width: Math.max(120, box.clientWidth), height: HEIGHT,
      legend: { show: true }, padding: [8, 6, 0, 0],
      cursor: { sync: { key: this.sync.key }, points: { size: 6 }, drag: { x: false, y: false } },
      scales: { x: { time: false }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] } },
      axes: [{ ...axis, size: 24, space: 70 }, { ...axis, size: 46, space: 28 }],
      series: [{}, {
        stroke: colour, width: 1.5, points: { show: false },
        fill: kind.bars ? colour : `${colour}2e`,
        ...(kind.bars ? { paths: uPlot.paths.bars({ size: [0.8, 8], gap: 0 }), width: 0 } : {}),
      }],
      hooks: { setCursor: [(plot) => this.tell(plot, kind, value)] },
    };
    const plot = new uPlot(options, [[], []], box);
    return { plot, kind, box, value };
  }

  show(steps) {
    this.steps = steps;
    const numbers = steps.map((step) => step[0]);
    for (const { plot, kind, value } of this.charts) {
      plot.setData([numbers, steps.map((step) => step[kind.index])]);
      this.tell(plot, kind, value);
    }
  }

  /** The value under the cursor, else the newest. */
  tell(plot, kind, value) {
    const step = this.steps[plot.cursor.idx ?? this.steps.length - 1];
    value.textContent = step
      ? `${step[kind.index].toLocaleString("en", { maximumFractionDigits: kind.digits })}` +
        (plot.cursor.idx == null ? "" : ` in step ${step[0].toLocaleString("en")}`)
      : "";
  }

  resize() {
    for (const { plot, box } of this.charts) {
      const width = Math.max(120, box.clientWidth);
      if (width !== plot.width) plot.setSize({ width, height: HEIGHT });
    }
  }
}
