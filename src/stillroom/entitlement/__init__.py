"""May one learn from this teacher? Records of terms, a three-valued verdict with reasons, obligations."""
