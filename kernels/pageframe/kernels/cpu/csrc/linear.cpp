// A linear layer, cut into tasks.
//
// A task is up to kRowBlock rows against a few panels. It walks panel by panel; of a panel, block by
// block of inputs; of a block, tile by tile of rows: the block of weights stays in the first-level
// cache while all rows of the task pass, the rows stay in the second-level cache while all panels
// pass, and weights come from memory once, in the order in which they lie.
#include "linear.h"

#include <algorithm>
#include <array>
#include <utility>

#include "linear_finish.h"
#include "linear_tile.h"

namespace pf {

namespace {

// Rows of a task: a multiple of every tile; 120 rows of 256 inputs are 120 KiB.
constexpr int64_t kRowBlock = 120;
// Most steps of a block. Few rows wait for weights, so that a block and the next one have to fit into
// the first-level cache, 18 KiB each; many rows compute, and take up their sums again for each block.
constexpr int64_t kBlockSteps = 288;
constexpr int64_t kBlockStepsOfFew = std::min(kBlockSteps, 18 * 1024 / kStepBytes);
constexpr int64_t kFewTiles = 6;
// How far ahead of what is used weights are fetched where they pass only once.
constexpr int64_t kAheadSteps = 64;
// At the end of a phase a thread waits for what another has under way, so tasks are small: many for
// each thread, as long as one is so many products (some microseconds) that its claim costs nothing.
constexpr int64_t kTasksPerThread = 32;
constexpr int64_t kTaskProducts = 1 << 19;
// Few rows are little work: then so many tasks must do.
constexpr int64_t kTasksPerThreadMin = 8;
constexpr int64_t kTaskPanelsMax = 16;
constexpr int kSideBySideMax = panels_of(1);

int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `total` things in as few groups as `most` allows, as even as can be.
struct EvenSplit {
    EvenSplit(int64_t total, int64_t most)
        : num_groups(std::max<int64_t>(1, cdiv(total, most))),
          size(total / num_groups),
          num_larger(total % num_groups) {}

    int64_t begin(int64_t group) const { return group * size + std::min(group, num_larger); }

    int64_t num_groups;
    int64_t size;
    int64_t num_larger;
};

// Most steps of a block that so many tiles of rows pass, of num_steps in all.
int64_t block_steps(int64_t num_tiles, int64_t num_steps) {
    // With one tile nothing is read twice: blocks would only interrupt the stream.
    if (num_tiles == 1) return num_steps;
    return num_tiles <= kFewTiles ? kBlockStepsOfFew : kBlockSteps;
}

// Panels that tiles of a task with so many rows take at once.
int side_by_side(int64_t num_rows) {
    return num_rows > 2 ? 1 : panels_of(static_cast<int>(num_rows));
}

struct Grid {
    Grid(const pf_linear_call& call, int num_threads)
        : rows(call.num_rows, kRowBlock), num_panels(linear_num_panels(call.shape)) {
        const int64_t total = num_panels * rows.num_groups;
        const int64_t products = cdiv(call.num_rows, rows.num_groups) * call.shape.num_in * kPanel;
        const int64_t wanted = std::max(cdiv(total, kTasksPerThread * num_threads),
                                        cdiv(kTaskProducts, products));
        const int64_t most = std::min(kTaskPanelsMax, cdiv(total, kTasksPerThreadMin * num_threads));
        // Panels that a tile takes side by side are not parted.
        const int64_t unit = side_by_side(call.num_rows);
        task_panels = cdiv(std::min(wanted, most), unit) * unit;
        num_columns = cdiv(num_panels, task_panels);
    }

    EvenSplit rows;
    int64_t num_panels;
    int64_t task_panels;
    int64_t num_columns;
};

// Rows [row_begin, row_end) against panels [panel_begin, panel_end).
struct Task {
    int64_t row_begin, row_end, panel_begin, panel_end;
    // Where this thread most likely goes on: others have the panels between.
    int64_t next_panel;
};

template <class Format>
using Accumulate = void (*)(const TileArgs<Format>&);

template <class Format, int kPanels, int... kRows>
constexpr auto accumulators(std::integer_sequence<int, kRows...>) {
    return std::array<Accumulate<Format>, sizeof...(kRows)>{accumulate<Format, kRows + 1, kPanels>...};
}

// The kernel for so many rows (1 .. kMaxRows) and one panel, or panels_of(rows) panels.
template <class Format>
Accumulate<Format> kernel_for(int64_t num_rows, int64_t num_panels) {
    static constexpr auto kSingle =
        accumulators<Format, 1>(std::make_integer_sequence<int, Format::kMaxRows>());
    if (num_panels == 1) return kSingle[static_cast<size_t>(num_rows - 1)];
    return num_rows == 1 ? accumulate<Format, 1, panels_of(1)> : accumulate<Format, 2, panels_of(2)>;
}

template <class Format>
class TaskRun {
public:
    TaskRun(const pf_linear_call& call, const Task& task)
        : call_(call),
          task_(task),
          tiles_(task.row_end - task.row_begin, Format::kMaxRows),
          num_steps_(cdiv(call.shape.num_in, Format::kInputsPerStep)),
          num_whole_steps_(call.shape.num_in / Format::kInputsPerStep),
          panel_size_(linear_panel_size(call.shape)),
          blocks_(num_whole_steps_, block_steps(tiles_.num_groups, num_steps_)) {}

    void run() {
        const int64_t num_rows = task_.row_end - task_.row_begin;
        const int unit = side_by_side(num_rows);
        int64_t panel = task_.panel_begin;
        while (panel < task_.panel_end) {
            const bool fits = panel + unit <= task_.panel_end;
            num_panels_ = fits ? unit : 1;
            run_panels(panel);
            panel += num_panels_;
        }
    }

private:
    using Row = typename Format::Row;
    using Weight = typename Format::Weight;

    static constexpr int64_t kStepValues = kPanel * Format::kInputsPerStep;

    const Weight* weights_of(int64_t panel) const {
        return static_cast<const Weight*>(call_.packed) + panel * panel_size_;
    }

    // All rows against num_panels_ panels.
    void run_panels(int64_t panel) {
        const Weight* weights = weights_of(panel);
        const bool is_last = panel + num_panels_ == task_.panel_end;
        for (int64_t block = 0; block < blocks_.num_groups; block++) {
            const int64_t step = blocks_.begin(block), end = blocks_.begin(block + 1);
            const bool is_end = is_last && block + 1 == blocks_.num_groups;
            const Weight* behind = is_end ? weights_of(task_.next_panel) : weights + end * kStepValues;
            if (tiles_.num_groups == 1)
                pass(weights, step, end, behind);
            else
                stay(weights, step, end, behind);
        }
        if (num_whole_steps_ < num_steps_)
            for (int64_t tile = 0; tile < tiles_.num_groups; tile++) add_half_step(tile, weights);
        for (int64_t p = 0; p < num_panels_; p++)
            linear_finish(call_, task_.row_begin, task_.row_end, panel + p, sums_ + p * kPanel,
                          num_panels_ * kPanel);
    }

    // Steps [step, end) against one tile: they pass once, and come shortly before they are used.
    void pass(const Weight* weights, int64_t step, int64_t end, const Weight* behind) {
        const bool goes_on = behind == weights + end * kStepValues || num_panels_ > 1;
        const int64_t turn = goes_on ? end : std::max(step, end - kAheadSteps);
        add(0, weights, step, turn, weights + (step + kAheadSteps) * kStepValues);
        if (turn < end) add(0, weights, turn, end, behind);
    }

    // Steps [step, end) against all tiles. While they are used, as many that come behind them are fetched:
    // each tile asks for its part.
    void stay(const Weight* weights, int64_t step, int64_t end, const Weight* behind) {
        const int64_t num_values = (end - step) * kStepValues;
        for (int64_t tile = 0; tile < tiles_.num_groups; tile++)
            add(tile, weights, step, end, behind + num_values * tile / tiles_.num_groups);
    }

    void add(int64_t tile, const Weight* weights, int64_t step, int64_t end, const Weight* ahead) {
        TileArgs<Format> args = tile_args(tile, weights, step, end);
        if (step == 0) args.before = kNoSums;
        args.ahead = reinterpret_cast<const char*>(ahead);
        args.ahead_step = kStepBytes / tiles_.num_groups;
        add(args);
    }

    // Steps [step, end) of a tile, on top of its sums so far.
    TileArgs<Format> tile_args(int64_t tile, const Weight* weights, int64_t step, int64_t end) {
        TileArgs<Format> args{};
        args.num_rows = tiles_.begin(tile + 1) - tiles_.begin(tile);
        args.x = row(tiles_.begin(tile)) + step * Format::kInputsPerStep;
        args.x_stride = call_.x_stride;
        args.weights = weights + step * kStepValues;
        args.panel_stride = panel_size_;
        args.num_steps = end - step;
        args.tile = sums_ + tiles_.begin(tile) * num_panels_ * kPanel;
        args.before = args.tile;
        args.ahead = reinterpret_cast<const char*>(args.weights);
        return args;
    }

    void add(const TileArgs<Format>& args) {
        kernel_for<Format>(args.num_rows, num_panels_)(args);
    }

    // The last input of an odd number of them: its partner is zero, and not read from the row.
    void add_half_step(int64_t tile, const Weight* weights) {
        TileArgs<Format> args = tile_args(tile, weights, num_whole_steps_, num_steps_);
        Row pairs[Format::kMaxRows * Format::kInputsPerStep] = {};
        for (int64_t r = 0; r < args.num_rows; r++)
            pairs[r * Format::kInputsPerStep] = args.x[r * args.x_stride];
        args.x = pairs;
        args.x_stride = Format::kInputsPerStep;
        add(args);
    }

    const Row* row(int64_t r) const {
        return static_cast<const Row*>(call_.x) + (task_.row_begin + r) * call_.x_stride;
    }

    const pf_linear_call& call_;
    const Task task_;
    const EvenSplit tiles_;
    const int64_t num_steps_;
    const int64_t num_whole_steps_;
    const int64_t panel_size_;
    const EvenSplit blocks_;
    int64_t num_panels_ = 1;
    alignas(64) float sums_[std::max<int64_t>(kRowBlock, 2 * kSideBySideMax) * kPanel];
};

}  // namespace

int64_t linear_num_tasks(const pf_linear_call& call, int num_threads) {
    if (call.num_rows == 0) return 0;
    const Grid grid(call, num_threads);
    return grid.rows.num_groups * grid.num_columns;
}

void linear_task(const pf_linear_call& call, int num_threads, int64_t index) {
    const Grid grid(call, num_threads);
    const int64_t block = index / grid.num_columns;
    const int64_t column = index % grid.num_columns;
    const int64_t next_column = (column + num_threads) % grid.num_columns;
    const Task task = {grid.rows.begin(block), grid.rows.begin(block + 1), column * grid.task_panels,
                       std::min((column + 1) * grid.task_panels, grid.num_panels),
                       next_column * grid.task_panels};
    if (call.shape.dtype == PF_F32)
        TaskRun<FloatFormat>(call, task).run();
    else if constexpr (kPairRows)
        TaskRun<PairFormat>(call, task).run();
    else
        TaskRun<WidenedFormat>(call, task).run();
}

}  // namespace pf
