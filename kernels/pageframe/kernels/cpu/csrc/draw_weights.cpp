#include "draw_weights.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace pf {

float Weighing::floor_of(double weight) const {
    // Differences, quotients and powers, here and in `weigh`, are off by far less of their size.
    constexpr double kSlack = 1e-5;
    const double floor = best_ + temperature_ * (std::log(weight) * (1 + kSlack) - kSlack);
    const auto nearest = static_cast<float>(std::max(floor, double{-FLT_MAX}));
    return nearest > floor ? std::nextafterf(nearest, -__builtin_inff()) : nearest;
}

}  // namespace pf
