"""One file per op: formula, public function, reference, kernels, registration."""
