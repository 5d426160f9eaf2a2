"""Bugs that the suite must find: the tables, and how they are planted."""

from smca.conformance.mutants.importing import planted_package
from smca.conformance.mutants.plant import MUTANTS, MutantResult, kill, planted
from smca.conformance.mutants.table import Mutant

__all__ = ["MUTANTS", "Mutant", "MutantResult", "kill", "planted", "planted_package"]
