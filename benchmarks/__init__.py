"""The programs, one per module here: ``python -m benchmarks.NAME``.

What they are made of lies beside them: ``measure`` (what is measured beside what, and how), ``train`` (a training run),
``gpu`` (the check of a machine with a GPU), ``common`` (command lines, files, units).
"""
