"""Whether a sequence for which there is room in this step may take it."""

from pageframe.scheduler.policies.protocols import RoomView, WaitingView


class WatermarkAdmission:
    """Some blocks have to be left for those who run: a hundredth of the pool.

    After a preemption, for some steps, it is as many as the newcomer will ever take as well;
    otherwise the one that was thrown out would come back at once and be thrown out again.
    """

    def admits(self, waiting: WaitingView, room: RoomView) -> bool:
        """Whether the watermark is kept."""
        num_blocks = room.num_blocks_watermark
        if room.is_cooling:
            num_blocks += room.num_blocks_more
        return room.num_blocks_left >= num_blocks


class ConservativeAdmission:
    """Everybody who runs can come to its last token, and so could the newcomer.

    Nobody is preempted then, but for what shared blocks and pins do; fewer run at once, for most
    stop long before ``max_tokens``. Right where preempting is dear and outputs are known well.
    """

    def admits(self, waiting: WaitingView, room: RoomView) -> bool:
        """Whether all could grow to their ends."""
        num_blocks = room.num_blocks_more + room.num_blocks_growth
        return room.num_blocks_left >= max(num_blocks, room.num_blocks_watermark)
