"""The update rules, one module each, named as in csrc/rules. A rule is two functions:

``prepare(row, step, first, sum_of_squares, scalar_state, T)`` returns its scalars of type T as a tuple, from a group's
hyper-parameters, the number of this step, whether the states are to be taken as
absent, and, for a rule of norms, the gradient's sum of squares and the tensor's scalar state.

``update(p, g, s, c, VARIANT)`` returns the new parameter and the tuple of the new states, from registers to registers;
``s`` are three states, of which the rule's own come first in the order of csrc/rules, and ``c`` the scalars. States
that the variant or the rule does not have are to be returned as they are.

A number of the group is ``hyper(row, H.EPS)``, one that is on or off ``flag(row, H.MAXIMIZE)``, where ``H =
layout.of_rule(name)`` knows the columns by the names in the rule's header.

A rule of norms also has ``next_scalar_state(row, sum_of_squares, scalar_state)``.
"""
