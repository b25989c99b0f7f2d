#include "cpu/contrast_rows.inl"
