// The scalars of one tensor after another, for one thread.
#pragma once

#include <cmath>

#include "../core/step_count.h"
#include "../rules/rule_handle.h"

namespace fusedoptim {

class TensorScalars {
 public:
  // knows_sums: whether those of the table are this step's; else they are NaN to the rule.
  TensorScalars(const RuleHandle& rule, const StepTable& table, bool knows_sums)
      : rule_(rule),
        table_(table),
        knows_sums_(knows_sums),
        neighbours_agree_(rule.sums == 0 && rule.number_names.empty()) {}

  // Valid until the next call. Neighbours usually agree in everything that scalars depend on.
  const void* of(const Entry& e) {
    const double step = next_step(e.step, e.step_dtype);
    const bool same = before_ && neighbours_agree_ && before_->group == e.group && before_->first == e.first &&
                      before_->compute_dtype() == e.compute_dtype() && step_before_ == step;
    if (!same) {
      const Program& program = rule_.programs[e.variant.program];
      (e.compute_dtype() == DType::f64 ? program.prepare_f64 : program.prepare_f32)(inputs(e, step), scalars_);
      before_ = &e;
      step_before_ = step;
    }
    return scalars_;
  }

  // Replaces the tensor's numbers by those after this step.
  void step_numbers(const Entry& e) {
    const Program& program = rule_.programs[e.variant.program];
    float next[kMaxNumbers];
    program.next_numbers(inputs(e, next_step(e.step, e.step_dtype)), next);
    for (int k = 0; k < rule_.numbers(); ++k)
      if (e.numbers[k]) *e.numbers[k] = next[k];
  }

 private:
  StepInputs inputs(const Entry& e, double step) {
    const int64_t at = &e - table_.entries.data();
    for (int k = 0; k < rule_.sums; ++k) sums_[k] = knows_sums_ ? table_.sums_row(k)[at] : NAN;
    for (int k = 0; k < rule_.numbers(); ++k) numbers_[k] = e.numbers[k] ? *e.numbers[k] : 0.0f;
    return {table_.rows[e.group].value, step, e.first, sums_, numbers_, static_cast<double>(e.whole_numel), &pow_};
  }

  const RuleHandle& rule_;
  const StepTable& table_;
  const bool knows_sums_, neighbours_agree_;
  alignas(64) unsigned char scalars_[kMaxScalarBytes];
  const Entry* before_ = nullptr;
  double step_before_ = 0;
  double sums_[kMaxSums];
  float numbers_[kMaxNumbers];
  PowMemo pow_;
};

}  // namespace fusedoptim
