"""The update rules, one module each, named as in csrc/rules. A rule is two functions:

``prepare(row, step, first, sum_of_squares, scalar_state, T)`` returns its scalars of type T as a tuple, from a group's
hyper-parameters (see csrc/rules for their order), the number of this step, whether the states are to be taken as
absent, and, for a rule of norms, the gradient's sum of squares and the tensor's scalar state.

``update(p, g, s0, s1, s2, c, VARIANT)`` returns the new parameter and states, from registers to registers; ``c`` are
the scalars. A variant's unused states are to be returned as they are.

A rule of norms also has ``next_scalar_state(row, sum_of_squares, scalar_state)``.
"""
