"""Tests of integer flow."""
