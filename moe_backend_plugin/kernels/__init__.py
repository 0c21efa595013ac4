"""CuTe DSL kernels and how they are compiled; nothing here knows a model or an engine, and importing the package compiles nothing."""
