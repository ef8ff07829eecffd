"""The multi-tensor kernels in Triton: the same tables, rules and bits as csrc/cuda. Imported at the first step that
uses them, because it needs Triton."""
