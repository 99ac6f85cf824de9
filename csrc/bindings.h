// What each source file with bindings of its own offers to the module.
#pragma once

#include <nanobind/nanobind.h>

void bind_lookup(nanobind::module_& module);
void bind_rebuild(nanobind::module_& module);
void bind_rows(nanobind::module_& module);
void bind_sweep(nanobind::module_& module);
void bind_viterbi(nanobind::module_& module);
