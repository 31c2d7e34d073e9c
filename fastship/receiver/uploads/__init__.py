"""``<root>/uploads/``: what has begun to come and is not published. Of the receiver it imports ``policy``.

Inside: ``uploads`` > (``sweep`` > ``bodies`` | ``upload`` | ``reserved``) > ``lock`` > ``partial``.
"""
