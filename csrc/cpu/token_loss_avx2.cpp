#include "cpu/token_loss_rows.inl"
