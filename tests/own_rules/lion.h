// Lion (arXiv:2302.06675). Program 0 has no weight decay, program 1 has.
struct Own {
  static constexpr int sums = 0, second_moment = -1;
  enum Hyper { kBeta1 = fusedoptim::kFirstRuleHyper, kBeta2, kWeightDecay };
  enum Slot { kExpAvg, kSlots };
  enum Number { kNumbers };
  static constexpr bool uses(int, int) { return true; }

  using Linear = LINEAR;
  using Unencoded = fusedoptim::MixList<>;
  static constexpr bool kTiles = TILES;

  template <class T>
  struct Scalars {
    T decay, neg_lr;
    fusedoptim::LerpWeight<T> toward_grad, keep;
  };

  template <class T>
  static Scalars<T> prepare(const fusedoptim::StepInputs& in) {
    const double* h = in.hyper;
    Scalars<T> c;
    c.decay = static_cast<T>(1 - h[fusedoptim::kLr] * h[kWeightDecay]);
    c.neg_lr = static_cast<T>(-h[fusedoptim::kLr]);
    c.toward_grad = fusedoptim::LerpWeight<T>::of(1 - h[kBeta1]);
    c.keep = fusedoptim::LerpWeight<T>::of(1 - h[kBeta2]);
    return c;
  }

  template <int, class M>
  FUSEDOPTIM_INLINE static void update(typename M::V& p, typename M::V g, typename M::V* s,
                                       const Scalars<typename M::T>& c) {
    using V = typename M::V;
    const V none = M::set(0), one = M::set(1);
    if (PROGRAM == 1) p = p * M::set(c.decay);
    const V m = fusedoptim::lerp<M>(s[kExpAvg], g, c.toward_grad);
    p = M::fma(M::set(c.neg_lr), (m > none ? one : none) - (m < none ? one : none), p);
    s[kExpAvg] = fusedoptim::lerp<M>(s[kExpAvg], g, c.keep);
  }
};
