"""The cost model of a device with the prices of a whole site under one fusion, which calibration compares."""

from fuseplan.planner.costs import CostModel, Kernel, Region, total_ns


class Contest(CostModel):
    """`alternative_ns` prices a site of which a fusion takes some parts; what it leaves is run unfused."""

    def alternative_ns(self, site: Region, taken: Region | None, provider: str) -> int:
        """`site` with the parts `taken` run by `provider` as one op, and the rest as Inductor leaves it."""
        return total_ns(self.alternative(site, taken, provider))

    def alternative(self, site: Region, taken: Region | None, provider: str) -> tuple[Kernel, ...]:
        """The kernels of `alternative_ns`."""
        if taken is None:
            return self.unfused(site)
        assert (taken.core, taken.residual) == (site.core, site.residual), (site, taken)
        assert taken.tail in (None, site.tail), (site, taken)
        assert taken.reduce <= site.reduce, (site, taken)
        before = self.reduce(site) if site.reduce and not taken.reduce else ()
        after = self.epilogue(site) if site.tail and not taken.tail else ()
        return (*before, *self.fused(taken, provider), *after)

    def unfused_ns(self, region: Region) -> int:
        """All of a region's parts as Inductor leaves them."""
        return total_ns(self.unfused(region))

    def fused_ns(self, region: Region, provider: str) -> int:
        """One fused op of all of a region's parts, by `provider`."""
        return total_ns(self.fused(region, provider))
