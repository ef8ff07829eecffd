// Reads the shards of DTensors, whose class is Python's: a wrapper without memory, around the tensor of this process.
//
// Both things that are read are private slots of the class: its objects have them at fixed places, so that a look takes
// a nanosecond. Where a torch has them elsewhere, they are read as any attribute is, 40 ns.
#pragma once

#include <structmember.h>

#include <utility>

#include "../core/inline.h"
#include "pybind.h"
#include "python_errors.h"

namespace fusedoptim {

// While it lives, attributes of subclasses are read as those of a plain tensor: torch would ask every one by name
// whether it has a __torch_function__, 100 ns each.
class WithoutTorchFunction {
 public:
  explicit WithoutTorchFunction(bool active) {
    if (!active) return;
    const Names& names = Names::get();
    guard_ = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallNoArgs(names.type));
    if (!guard_) throw pybind11::error_already_set();
    if (!call(PyObject_CallMethodNoArgs(guard_.ptr(), names.enter))) throw pybind11::error_already_set();
  }
  ~WithoutTorchFunction() {
    if (!guard_) return;
    const pybind11::error_scope kept;
    const Names& names = Names::get();
    if (!call(PyObject_CallMethodObjArgs(guard_.ptr(), names.exit, Py_None, Py_None, Py_None, nullptr)))
      PyErr_WriteUnraisable(guard_.ptr());
  }
  WithoutTorchFunction(const WithoutTorchFunction&) = delete;
  WithoutTorchFunction& operator=(const WithoutTorchFunction&) = delete;

 private:
  struct Names {  // which live as long as the process
    PyObject *type, *enter, *exit;
    static const Names& get() {
      static const Names names{
          pybind11::object(pybind11::module_::import("torch").attr("_C").attr("DisableTorchFunctionSubclass"))
              .release()
              .ptr(),
          PyUnicode_InternFromString("__enter__"), PyUnicode_InternFromString("__exit__")};
      return names;
    }
  };
  static bool call(PyObject* result) {
    Py_XDECREF(result);
    return result != nullptr;
  }

  pybind11::object guard_;
};

class ShardReader {
 public:
  ShardReader() = default;  // as long as there is no such class
  // align: makes of a parameter and its gradient one that is placed as the parameter is (fusedoptim/_dtensor.py).
  ShardReader(const pybind11::object& cls, pybind11::object align)
      : align_(std::move(align)),
        type_(reinterpret_cast<PyTypeObject*>(cls.ptr())),
        local_(cls, "_local_tensor"),
        spec_(cls, "_spec") {}

  bool is_dtensor(PyObject* x) const { return type_ && PyObject_TypeCheck(x, type_); }
  // An empty object, with no Python error left set, if there is no such attribute.
  pybind11::object local(PyObject* dtensor) const { return local_.get(dtensor); }
  pybind11::object spec(PyObject* dtensor) const { return spec_.get(dtensor); }
  // The shard of a DTensor whose spec is one of these, as long as that lives; null if it is not, or if slots are no
  // slots.
  PyObject* local_if(PyObject* dtensor, PyObject* spec, PyObject* other) const {
    PyObject* const own = spec_.peek(dtensor);
    return own && (own == spec || own == other) ? local_.peek(dtensor) : nullptr;
  }
  // A DTensor itself, not one of a class made from it.
  bool is_plain_dtensor(PyObject* x) const { return type_ && Py_TYPE(x) == type_; }
  // Borrowed, for as long as the DTensor keeps it; null if slots are no slots.
  PyObject* peek_local(PyObject* dtensor) const { return local_.peek(dtensor); }
  PyObject* peek_spec(PyObject* dtensor) const { return spec_.peek(dtensor); }
  // Whether a DTensor still has what these gave.
  bool has(PyObject* dtensor, PyObject* local, PyObject* spec) const {
    return local_.is(dtensor, local) && spec_.is(dtensor, spec);
  }
  // See prefetch.h.
  FUSEDOPTIM_INLINE void prefetch(PyObject* dtensor) const { local_.prefetch(dtensor); }

  pybind11::object align(PyObject* param, PyObject* grad) const {
    return align_(pybind11::handle(param), pybind11::handle(grad));
  }

 private:
  class Slot {
   public:
    Slot() = default;
    Slot(const pybind11::object& cls, const char* name)
        : name_(pybind11::reinterpret_steal<pybind11::object>(PyUnicode_InternFromString(name))) {
      const pybind11::object found = pybind11::getattr(cls, name, pybind11::none());
      if (Py_TYPE(found.ptr()) != &PyMemberDescr_Type) return;
      const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member;
      if (member->type == T_OBJECT_EX) offset_ = member->offset;
    }
    pybind11::object get(PyObject* x) const {
      if (offset_ > 0) return pybind11::reinterpret_borrow<pybind11::object>(at(x));
      auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(x, name_.ptr()));
      if (!found) forget_python_error();
      return found;
    }
    PyObject* peek(PyObject* x) const { return offset_ > 0 ? at(x) : nullptr; }
    bool is(PyObject* x, PyObject* value) const { return (offset_ > 0 ? at(x) : get(x).ptr()) == value; }
    FUSEDOPTIM_INLINE void prefetch(PyObject* x) const {
      __builtin_prefetch(reinterpret_cast<const char*>(x) + offset_);
    }

   private:
    PyObject* at(PyObject* x) const { return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(x) + offset_); }

    pybind11::object name_;
    Py_ssize_t offset_ = 0;
  };

  pybind11::object align_;
  PyTypeObject* type_ = nullptr;  // torch's, which outlives everything
  Slot local_, spec_;
};

}  // namespace fusedoptim
