// What a step does around its rule, in the same pass: the gradient is unscaled, scaled down to a limit of the norm over
// all gradients and held within a limit by value; then the rule; then the moving average of the parameter, and zeros
// where the gradient was. Each operation rounds as torch's own separate call does.
#pragma once

#include <cmath>

#include "dtype.h"

namespace fusedoptim {

// Results that outlive a step, in memory on the device. The optimizer owns them.
struct NormStats {
  double norm;     // of all gradients in the last step
  double skipped;  // how many steps were skipped, because it was not finite
};

// What an optimizer is made with.
struct StepSettings {
  NormStats* norm_stats = nullptr;
  bool skip_nonfinite = false;  // a step whose norm is not finite changes nothing
  bool zero_grad = false;       // gradients are left as zeros, in a skipped step as well
};

// The reciprocal of GradScaler's scale, as it rounds it.
FUSEDOPTIM_HD float unscale_by(const float* grad_scale) {
  return grad_scale ? static_cast<float>(1.0 / static_cast<double>(*grad_scale)) : 1.0f;
}

// The norm of all gradients: rounded to fp32 unless some parameter with a gradient has fp64.
FUSEDOPTIM_HD double norm_of(double sum_of_squares, bool in_f64) {
  const double norm = std::sqrt(sum_of_squares);
  return in_f64 ? norm : static_cast<double>(static_cast<float>(norm));
}

// What torch.nn.utils.clip_grad_norm_ multiplies gradients by, with its roundings: min(1, max_norm / (norm + 1e-6)),
// where a number over a tensor is its reciprocal times the number. An infinite max_norm changes nothing, whatever the
// norm is.
FUSEDOPTIM_HD double clip_coefficient(double max_norm, double norm, bool in_f64) {
  double c;
  if (max_norm == static_cast<double>(INFINITY)) return 1.0;
  if (in_f64)
    c = 1.0 / (norm + 1e-6) * max_norm;
  else
    c = 1.0f / (static_cast<float>(norm) + 1e-6f) * static_cast<float>(max_norm);
  return c > 1.0 ? 1.0 : c;
}

FUSEDOPTIM_HD bool is_finite(double x) { return x - x == 0; }

// The options of a group, as its row has them: below 0 each is off.
struct GroupOptions {
  double max_grad_norm, clip_grad_value, ema_decay;
};

// The numbers of one group's transforms, in one step.
struct GroupTransforms {
  float unscale = 1;        // gradients are multiplied by this, in the compute dtype, then
  double coefficient = 1;   // by this, and then
  double limit = INFINITY;  // held within [-limit, limit]
  double ema_decay = -1;    // of the moving average; below 0: none
  bool zero_grad = false;

  // norm: of all unscaled gradients, which only clipping by norm looks at.
  FUSEDOPTIM_HD static GroupTransforms of(const GroupOptions& o, float unscale, double norm, bool norm_in_f64,
                                          bool zero_grad) {
    GroupTransforms t;
    t.unscale = unscale;
    if (o.max_grad_norm >= 0) t.coefficient = clip_coefficient(o.max_grad_norm, norm, norm_in_f64);
    if (o.clip_grad_value >= 0) t.limit = o.clip_grad_value;
    t.ema_decay = o.ema_decay;
    t.zero_grad = zero_grad;
    return t;
  }
  FUSEDOPTIM_HD static GroupTransforms unscaled(float unscale) {
    GroupTransforms t;
    t.unscale = unscale;
    return t;
  }

  FUSEDOPTIM_HD bool leave_gradient() const {
    return unscale == 1 && coefficient == 1 && limit == static_cast<double>(INFINITY);
  }
  FUSEDOPTIM_HD bool do_nothing() const { return leave_gradient() && ema_decay < 0 && !zero_grad; }
};

}  // namespace fusedoptim
