"""The update rules, one module each, named as in csrc/rules. A rule is two functions:

``prepare(row, inputs, T, VARIANT)`` returns its scalars of type T as a tuple, from a group's hyper-parameters and
``inputs``, a tuple: the number of this step, whether the states are to be taken as absent, two sums of squares over the
whole tensor and the tensor's three numbers, of which the rule's own come first, and the whole tensor's elements. All
but the second are fp64, and 0 where there is none.

``update(p, g, s, c, VARIANT)`` returns the new parameter and the tuple of the new states, from registers to registers;
``s`` are three states, of which the rule's own come first in the order of csrc/rules, and ``c`` the scalars. States
that the variant or the rule does not have are to be returned as they are.

A number of the group is ``hyper(row, H.EPS)``, one that is on or off ``flag(row, H.MAXIMIZE)``, where ``H =
layout.of_rule(name)`` knows the columns by the names in the rule's header.

A rule that has numbers also has ``next_numbers(row, inputs, VARIANT)``, which returns the tuple of the new ones. One
that has sums of anything else than its gradient has ``measured(p, g, s, c, VARIANT)``, which returns the two whose
squares are summed, of the values before the step; ``c`` was made of sums that are NaN.
"""
