"""Tests of blockprune; a package so that they share the zoo and the oracle."""
