// Which rows of hyper-parameters a program is for, where that is not compiled: conditions on a row's numbers, as Python
// worked them out, in postfix order.
#pragma once

#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fusedoptim {

// All that is left on the stack has to hold. So without operations it is for every row, and two guards one behind the
// other are for the rows of both.
class Guard {
 public:
  // Operations with their numbers, which only two of them have.
  explicit Guard(const std::vector<std::pair<std::string, double>>& operations = {}) {
    int height = 0;
    for (const auto& [name, number] : operations) {
      const Named* const found = find(name);
      if (!found) throw std::invalid_argument("a guard has no operation " + name);
      if (height < found->takes) throw std::invalid_argument("a guard's operation " + name + " has too few operands");
      height += 1 - found->takes;
      if (height > kMost) throw std::invalid_argument("a guard leaves too much on its stack");
      operations_.push_back({found->operation, number});
    }
  }

  // Whether all columns are some of a row's.
  bool fits(int columns) const {
    for (const auto& [operation, number] : operations_)
      if (operation == Operation::column && !(number >= 0 && number < columns)) return false;
    return true;
  }

  // constants: the number that Python gave the group's values that are none.
  bool holds(const double* row, double constants) const {
    double stack[kMost];
    int n = 0;
    for (const auto& [operation, number] : operations_) {
      double &a = stack[n > 1 ? n - 2 : 0], &b = stack[n > 0 ? n - 1 : 0];
      switch (operation) {
        case Operation::column:
          stack[n++] = row[static_cast<int>(number)];
          continue;
        case Operation::constant:
          stack[n++] = number;
          continue;
        case Operation::constants:
          stack[n++] = constants;
          continue;
        case Operation::neg:
          b = -b;
          continue;
        case Operation::abs:
          b = std::fabs(b);
          continue;
        case Operation::sqrt:
          b = std::sqrt(b);
          continue;
        case Operation::fp32:
          b = static_cast<double>(static_cast<float>(b));
          continue;
        case Operation::logical_not:
          b = b == 0;
          continue;
        case Operation::add:
          a = a + b;
          break;
        case Operation::sub:
          a = a - b;
          break;
        case Operation::mul:
          a = a * b;
          break;
        case Operation::div:
          a = a / b;
          break;
        case Operation::pow:
          a = std::pow(a, b);
          break;
        case Operation::lt:
          a = a < b;
          break;
        case Operation::le:
          a = a <= b;
          break;
        case Operation::gt:
          a = a > b;
          break;
        case Operation::ge:
          a = a >= b;
          break;
        case Operation::eq:
          a = a == b;
          break;
        case Operation::ne:
          a = a != b;
          break;
        case Operation::logical_and:
          a = a != 0 && b != 0;
          break;
        case Operation::logical_or:
          a = a != 0 || b != 0;
          break;
      }
      --n;
    }
    for (int k = 0; k < n; ++k)
      if (stack[k] == 0) return false;
    return true;
  }

 private:
  enum class Operation {
    column,
    constant,
    constants,
    neg,
    abs,
    sqrt,
    fp32,
    logical_not,
    add,
    sub,
    mul,
    div,
    pow,
    lt,
    le,
    gt,
    ge,
    eq,
    ne,
    logical_and,
    logical_or,
  };
  struct Named {
    const char* name;
    Operation operation;
    int takes;
  };
  static constexpr int kMost = 64;

  static const Named* find(const std::string& name) {
    using O = Operation;
    static constexpr Named all[] = {{"column", O::column, 0},
                                    {"constant", O::constant, 0},
                                    {"constants", O::constants, 0},
                                    {"neg", O::neg, 1},
                                    {"abs", O::abs, 1},
                                    {"sqrt", O::sqrt, 1},
                                    {"fp32", O::fp32, 1},
                                    {"not", O::logical_not, 1},
                                    {"add", O::add, 2},
                                    {"sub", O::sub, 2},
                                    {"mul", O::mul, 2},
                                    {"div", O::div, 2},
                                    {"pow", O::pow, 2},
                                    {"lt", O::lt, 2},
                                    {"le", O::le, 2},
                                    {"gt", O::gt, 2},
                                    {"ge", O::ge, 2},
                                    {"eq", O::eq, 2},
                                    {"ne", O::ne, 2},
                                    {"and", O::logical_and, 2},
                                    {"or", O::logical_or, 2}};
    for (const Named& named : all)
      if (name == named.name) return &named;
    return nullptr;
  }

  std::vector<std::pair<Operation, double>> operations_;
};

}  // namespace fusedoptim
