// A step along a momentum, as long as the parameter's norm allows, by a ratio that may change slowly.
struct Own {
  static constexpr int sums = 2, second_moment = -1;
  enum Hyper { kBeta = fusedoptim::kFirstRuleHyper, kSlow };
  enum Slot { kMomentum, kSlots };
  enum Number { kRatio, kNumbers };
  static constexpr bool uses(int, int) { return true; }
  static constexpr bool measures(int) { return true; }

  using Linear = LINEAR;
  using Unencoded = fusedoptim::MixList<>;
  static constexpr bool kTiles = TILES;

  template <class T>
  struct Scalars {
    fusedoptim::LerpWeight<T> toward_grad;
    T neg_step_size;
  };

  static double ratio(const fusedoptim::StepInputs& in) {
    const double mean = in.numel > 0 ? in.sums[1] / in.numel : 0;
    const double now = mean > 0 ? std::sqrt(in.sums[0]) / fusedoptim::power(mean, 0.5) : 1.0;
    return in.hyper[kSlow] != 0 ? static_cast<float>(0.9 * in.numbers[kRatio] + 0.1 * now) : now;
  }
  static void next_numbers(const fusedoptim::StepInputs& in, float* out) {
    out[kRatio] = static_cast<float>(ratio(in));
  }

  template <class T>
  static Scalars<T> prepare(const fusedoptim::StepInputs& in) {
    return {fusedoptim::LerpWeight<T>::of(1 - in.hyper[kBeta]), static_cast<T>(-in.hyper[fusedoptim::kLr] * ratio(in))};
  }

  template <class M>
  FUSEDOPTIM_INLINE static void measured(typename M::V p, typename M::V g, const typename M::V* s,
                                         const Scalars<typename M::T>& c, typename M::V* x) {
    x[0] = p;
    x[1] = fusedoptim::lerp<M>(s[kMomentum], g, c.toward_grad);
  }

  template <int, class M>
  FUSEDOPTIM_INLINE static void update(typename M::V& p, typename M::V g, typename M::V* s,
                                       const Scalars<typename M::T>& c) {
    s[kMomentum] = fusedoptim::lerp<M>(s[kMomentum], g, c.toward_grad);
    p = M::fma(M::set(c.neg_step_size), s[kMomentum], p);
  }
};
