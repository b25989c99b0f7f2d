#include "cpu/orthogonal_rows.inl"
